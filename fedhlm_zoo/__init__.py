"""The default model pair: data loading, training, distillation, ONNX export, quantisation and the shipped artefacts."""
