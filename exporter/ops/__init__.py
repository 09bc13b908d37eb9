"""The ``cpm`` ops as torch functions: eager when called, one ONNX node each when exported."""
