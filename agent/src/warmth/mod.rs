//! The warm rungs below serving: models that sleep ([`sleep`]) and weights in the page cache ([`page_cache`]).

pub mod page_cache;
pub mod sleep;

pub use page_cache::{PageCache, Residency, StageError, Staged};
pub use sleep::{SleepError, Slept, fall_asleep, wake};
