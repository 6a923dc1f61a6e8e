//! MVTec-AD folder layout: scanning a data set, pairing images with masks.
