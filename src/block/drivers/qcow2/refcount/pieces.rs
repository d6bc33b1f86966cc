//! Sets of pieces of a refcount block.
#![forbid(unsafe_code)]

/// A set of numbers below 512: a block of 2 MiB, the largest, has 512 pieces of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces([u64; 8]);

impl Pieces {
    /// The numbers below `n`.
    pub fn first(n: usize) -> Pieces {
        let mut all = Pieces::default();
        (0..n).for_each(|piece| all.insert(piece));
        all
    }

    pub fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }

    pub fn has(&self, piece: usize) -> bool {
        self.0[piece / 64] >> (piece % 64) & 1 != 0
    }

    pub fn insert(&mut self, piece: usize) {
        self.0[piece / 64] |= 1 << (piece % 64);
    }

    pub fn add(&mut self, others: &Pieces) {
        self.0.iter_mut().zip(others.0).for_each(|(mine, other)| *mine |= other);
    }
}
