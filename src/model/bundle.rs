//! Load, verify and describe a bundle: one standard ONNX file with everything `cull` needs in its metadata.
