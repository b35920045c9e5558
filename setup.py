"The package's metadata: everything here comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(text):
    return [l.strip() for l in text.splitlines() if l.strip()]


extras = {name: lines(text) for name, text in ini["extras"].items() if name not in ini.defaults()}
extras["dev"] = sorted({req for reqs in extras.values() for req in reqs})  # dev contains every other extra

entry_points = {}
for group, point in (line.split(":", 1) for line in lines(cfg["entry_points"])):
    entry_points.setdefault(group.strip(), []).append(point.strip())

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    project_urls={"Paper": cfg["paper"]},
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['development_status']}",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=lines(cfg["requirements"]),
    extras_require=extras,
    entry_points=entry_points,
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    package_data={cfg["lib_name"]: ["py.typed", "*.pyi"]},
)
