//! The edge: takes requests, finds their service, holds and forwards them.
