//! Live page and metrics, off by default beyond loopback.
