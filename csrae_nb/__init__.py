"""Cauchy-Schwarz Regularized Autoencoders: a notebook-first implementation."""

__version__ = "0.1.0"

import os
from importlib import import_module

if os.environ.get("CSRAE_TYPECHECK") == "1": # the tests enforce the shapes in the signatures
    from jaxtyping import install_import_hook
    install_import_hook("csrae_nb", "beartype.beartype")

from .registry import PLUGINS, with_parameters

# chapters that register something, and that no chapter before them names
PLUGINS[:] = ["csrae_nb.rivals", "csrae_nb.posterior", "csrae_nb.tasks", "csrae_nb.few_labels", "csrae_nb.faces",
    "csrae_nb.videos"]

_names = { # the main names, each in its module; loaded on first use, so that `import csrae_nb` stays light
    "mixtures": "GMM FullGMM",
    "divergence": "cs_divergence log_overlap kl_divergence",
    "priors": "StandardNormal MoGPrior VampPrior",
    "models": "VAE IWAE MixtureVAE VampPriorVAE CSRAE MixtureCSRAE",
    "catalogue": "load_data",
    "config": "Config",
    "runs": "fit load_run",
    "estimator": "CSRAEEmbedding",
    "sharing": "Pretrained open_run",
}
_home = {name: module for module, names in _names.items() for name in names.split()}
__all__ = ["__version__", *_home]

def __getattr__(name):
    if name not in _home: raise AttributeError(f"module 'csrae_nb' has no attribute {name!r}")
    return with_parameters(getattr(import_module(f"csrae_nb.{_home[name]}"), name)) # help() shows their comments

def __dir__(): return sorted([*globals(), *_home])
