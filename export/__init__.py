"""Export: a delta folded into its encoder's weights or standing beside them, as ONNX, verified against torch."""
