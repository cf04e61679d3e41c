"""The default model pair: data loading, training, distillation, ONNX export, quantisation and the shipped artefacts."""

import fedhlm  # noqa: F401 - it tells libraries not to report anything, before any of these is imported
