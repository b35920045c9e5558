"What `import csrae_nb` offers, for type checkers; __init__.py loads each name when it is first asked for."

from .catalogue import load_data as load_data
from .config import Config as Config
from .divergence import cs_divergence as cs_divergence
from .divergence import kl_divergence as kl_divergence
from .divergence import log_overlap as log_overlap
from .estimator import CSRAEEmbedding as CSRAEEmbedding
from .mixtures import GMM as GMM
from .mixtures import FullGMM as FullGMM
from .models import CSRAE as CSRAE
from .models import IWAE as IWAE
from .models import VAE as VAE
from .models import MixtureCSRAE as MixtureCSRAE
from .models import MixtureVAE as MixtureVAE
from .models import VampPriorVAE as VampPriorVAE
from .priors import MoGPrior as MoGPrior
from .priors import StandardNormal as StandardNormal
from .priors import VampPrior as VampPrior
from .runs import fit as fit
from .runs import load_run as load_run
from .sharing import Pretrained as Pretrained
from .sharing import open_run as open_run

__version__: str
