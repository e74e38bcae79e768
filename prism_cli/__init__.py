"""`prismctl`: what people use. It knows the control plane only by its protos."""
