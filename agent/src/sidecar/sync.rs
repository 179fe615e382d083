//! The lock of this module. With the feature `shuttle`, tests run every interleaving that shuttle finds.

#[cfg(feature = "shuttle")]
pub(super) use shuttle::sync::{Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub(super) use std::sync::{Mutex, MutexGuard};

/// Locks, also after a panic elsewhere: that leaves at worst a miscounted slot, and all others are still served.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
