"The kernels for a GPU against the plain form, by Triton's interpreter on a CPU, in a process of its own."

import os, subprocess, sys
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_give_what_the_plain_form_gives():
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"} | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=env, check=True)


def let_the_interpreter_loop():
    "Its loops over a number that a kernel is given fail with NumPy 2.4, which makes no int of an array (1,)."
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope=None):
        if scope is None:  # Triton 3.0, which comes with torch 2.4
            plain(tensor)
            tensor.__index__ = lambda t: t.handle.data.item()
            return
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda t: t.handle.data.item())

    interpreter._patch_lang_tensor = patched


def compare(P, N, M, D, dtype, eps):
    import torch
    from csrae_nb import kernels

    r = lambda *shape: torch.randn(*shape, dtype=dtype)
    q, p = ((r(P, n, D), (0.5 * r(P, n, D)).exp()) for n in (N, M))
    for left, right in ((q, p), (q, q)):
        leaves = [t.requires_grad_() for t in (*left, *(right if right is p else ()))]
        same = right is q
        g = r(1 if same else 2, P, N, right[0].shape[1])
        plain = kernels.naive_log_z(*left, *right)
        ours = kernels._log_z_by_tiles(*left, *right, same)
        torch.testing.assert_close(ours, plain, rtol=eps, atol=eps)
        wanted = [torch.autograd.grad((plain * each).sum(), leaves, retain_graph=True) for each in g]
        wanted = wanted[0][:2] + wanted[-1][2:]  # either side has its own
        with torch.no_grad():
            got = kernels._gradients_by_tiles(*left, *right, g, same)
        got = (got[0] + got[2], got[1] + got[3]) if same else got
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=eps, atol=eps * max(1.0, b.norm().item()))


if __name__ == "__main__":
    let_the_interpreter_loop()
    import torch
    import triton

    double = 1e-7 if triton.__version__ == "3.0.0" else 1e-12  # its literals are of single precision
    torch.manual_seed(0)
    for sizes in ((2, 19, 37, 5), (3, 70, 33, 20), (1, 1, 5, 40), (5, 1, 66, 3)):
        compare(*sizes, torch.float32, 2e-5)
        compare(*sizes, torch.float64, double)
    compare(0, 3, 4, 2, torch.float32, 1e-6)
