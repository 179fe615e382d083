//! Per replica: the concurrency limit, its waiters, its load.
