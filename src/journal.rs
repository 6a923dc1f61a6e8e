//! Every verdict in an embedded SQLite database.
