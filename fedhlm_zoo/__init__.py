"""The default model pair: data, training, distillation, ONNX export, quantisation and the shipped models."""

import fedhlm  # noqa: F401 - it tells libraries not to report anything, before any of these is imported
