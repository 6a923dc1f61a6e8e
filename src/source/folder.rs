//! Pictures from a folder, in MVTec-AD layout or flat.
