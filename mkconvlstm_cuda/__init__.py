"""Multi-kernel convolutional LSTM (Agethen & Hsu) for PyTorch, its recurrence fused into GPU kernels."""

from importlib.metadata import PackageNotFoundError, version

from . import flops as flops  # torch's counter knows our operations from here on
from . import functional
from .attention import FlowAttention
from .cell import MKConvLSTMCell
from .dispatch import names as backends
from .layer import MKConvLSTM
from .transition import Branch, Transition, inception_branches

try:
    __version__ = version("mkconvlstm_cuda")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Branch",
    "FlowAttention",
    "MKConvLSTM",
    "MKConvLSTMCell",
    "Transition",
    "__version__",
    "backends",
    "functional",
    "inception_branches",
]
