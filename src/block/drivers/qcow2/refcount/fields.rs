//! Refcounts in the words of a refcount block: the same fields as [`refcount_get`](super::super::layout::refcount_get)
//! finds in the block's bytes, eight of which make a big-endian word.
#![forbid(unsafe_code)]

/// Refcounts of one width.
#[derive(Clone, Copy, Debug)]
pub struct Fields {
    /// log2 of their width in bits.
    order: u32,
}

impl Fields {
    /// Fields of 1 << `order` bits.
    pub const fn new(order: u32) -> Fields {
        Fields { order }
    }

    /// How many are in a word.
    pub const fn per_word(self) -> usize {
        64 >> self.order
    }

    /// The word with field `index`, and the field's lowest bit there.
    pub const fn place(self, index: usize) -> (usize, u32) {
        let bit = index << self.order;
        let (byte, within) = ((bit / 8 % 8) as u32, (bit % 8) as u32);
        let width = 1 << self.order;
        // A field narrower than a byte starts at the byte's lowest bit; a wider one ends with its last byte.
        let last = if width < 8 { byte } else { byte + width / 8 - 1 };
        (bit / 64, 56 - 8 * last + within)
    }

    const fn mask(self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// The field at `shift` of `word`.
    pub const fn get(self, word: u64, shift: u32) -> u64 {
        word >> shift & self.mask()
    }

    /// `word` with `value` at `shift`.
    pub const fn with(self, word: u64, shift: u32, value: u64) -> u64 {
        assert!(value <= self.mask(), "the refcount does not fit");
        word & !(self.mask() << shift) | value << shift
    }

    /// Whether a field of `word` is 0.
    pub const fn any_zero(self, word: u64) -> bool {
        // A borrow reaches the top of the lowest field that is 0; above it the answer no longer matters.
        let low = u64::MAX / self.mask();
        let high = low << ((1 << self.order) - 1);
        word.wrapping_sub(low) & !word & high != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::layout::{refcount_get, refcount_set};
    use super::*;

    fn words(bytes: &[u8]) -> Vec<u64> {
        bytes.chunks(8).map(|b| u64::from_be_bytes(b.try_into().unwrap())).collect()
    }

    proptest! {
        #[test]
        fn words_and_bytes_agree(bytes: [u8; 32], order in 0u32..=6, at: usize, value: u64) {
            let fields = Fields::new(order);
            let count = 256 >> order;
            let words = words(&bytes);
            for index in 0..count {
                let (word, shift) = fields.place(index);
                prop_assert_eq!(fields.get(words[word], shift), refcount_get(&bytes, order, index));
            }
            let (index, value) = (at % count, value & fields.mask());
            let mut changed = bytes;
            refcount_set(&mut changed, order, index, value);
            let (word, shift) = fields.place(index);
            let new = fields.with(words[word], shift, value);
            prop_assert_eq!(new.to_be_bytes(), &changed[word * 8..][..8]);
        }

        /// Words in which few fields are 0: any bits, or'ed with bits that leave few fields alone.
        #[test]
        fn a_zero_is_found(a: u64, b: u64, c: u64, order in 0u32..=6) {
            let fields = Fields::new(order);
            for word in [a, a | b, a | b | c, a & b, a & b & c, 0, u64::MAX] {
                let any = (0..fields.per_word())
                    .any(|i| fields.get(word, fields.place(i).1) == 0);
                prop_assert_eq!(fields.any_zero(word), any, "{:#x}", word);
            }
        }
    }
}
