//! Taking a mutex.

use std::sync::{Mutex, MutexGuard};

/// Locks, poisoned or not: the states behind our locks are whole between any two statements that can panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
