//! Sessions with agents: what they report, what they are told.
