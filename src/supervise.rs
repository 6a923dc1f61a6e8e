//! Stage progress -> systemd watchdog, restart of a stuck source or link.
