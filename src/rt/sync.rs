//! Waiting for one another in `async` code: locks that may be held across `.await`.
