//! Decisions out of bytes. When there are no more bytes all numbers are 0, so shorter inputs are simpler images.

/// Bytes not yet used.
pub struct Entropy<'a>(pub &'a [u8]);

impl Entropy<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        (0..8).fold(0, |n, _| n << 8 | u64::from(self.byte()))
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        let (mut left, mut number) = (n - 1, 0);
        while left > 0 {
            number = number << 8 | u64::from(self.byte());
            left >>= 8;
        }
        number % n
    }

    /// One of a list.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// True once in `n`; not when there are no more bytes.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }
}
