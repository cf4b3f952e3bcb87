"""Lightning callbacks: thin adapters between a Trainer and the passes."""

from mpfx.callbacks.calibration import CallRecorder, ModelCalibration
from mpfx.callbacks.compression import ModelCompression

__all__ = ["CallRecorder", "ModelCalibration", "ModelCompression"]
