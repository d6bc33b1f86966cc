//! The generic layer of every request: checks, alignment, splitting, zero detection.
