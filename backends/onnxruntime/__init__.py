"""The CPU target: one ONNX model, run by ONNX Runtime."""
