"""Engines without control flow: ONNX graphs of fixed depth and a dispatcher on the host."""
