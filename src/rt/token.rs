//! What the kernel answers a request, a watch or a cancellation with: 2 bits say whom it is for, 62 are theirs.
#![forbid(unsafe_code)]

/// Whom an answer is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The thread's own program.
    Fast,
    /// A slow-lane operation.
    Op,
    /// A watch.
    Watch,
    /// Nobody.
    Ignored,
}

/// The payload's part of a token.
pub const TOKEN_BITS: u64 = (1 << 62) - 1;

/// `payload` (below 2^62) for `kind`.
pub const fn token(kind: Kind, payload: u64) -> u64 {
    (kind as u64) << 62 | payload & TOKEN_BITS
}

/// Whom `token` is for.
pub const fn kind_of(token: u64) -> Kind {
    match token >> 62 {
        0 => Kind::Fast,
        1 => Kind::Op,
        2 => Kind::Watch,
        _ => Kind::Ignored,
    }
}

/// Whether `token` is of a transfer or a call.
pub const fn is_request(token: u64) -> bool {
    token >> 63 == 0
}
