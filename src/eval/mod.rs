//! AUROC, AUPRO, F1-max, single-threshold metrics, report.
