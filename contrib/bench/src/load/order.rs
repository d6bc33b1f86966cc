//! A random order of all blocks without a table of them: a bijection on the next power of two, whose
//! values beyond the end are left out.

/// Odd, so that multiplying by them modulo 2^n can be undone: each value comes once.
const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93];

/// Gives each number below `len` once.
#[derive(Debug)]
pub struct Order {
    at: u64,
    len: u64,
    mask: u64,
    shift: u32,
    key: u64,
}

impl Order {
    /// An order of `0..len`; other keys, other orders.
    pub fn new(len: u64, key: u64) -> Self {
        let mask = len.next_power_of_two() - 1;
        Self { at: 0, len, mask, shift: mask.count_ones() / 2 + 1, key }
    }
}

impl Iterator for Order {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        while self.at <= self.mask {
            let mut x = self.at.wrapping_add(self.key) & self.mask;
            self.at += 1;
            for factor in FACTORS {
                x ^= x >> self.shift;
                x = x.wrapping_mul(factor) & self.mask;
            }
            x ^= x >> self.shift;
            if x < self.len {
                return Some(x);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_once_and_not_in_sequence() {
        for len in [1, 2, 3, 7, 64, 1000, 65_537] {
            let order: Vec<u64> = Order::new(len, 12_345).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..len), "{len}");
            let next = order.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count();
            assert!(len < 64 || (next as u64) < len / 8, "{len}: {next} neighbours");
        }
        assert!(Order::new(1000, 1).ne(Order::new(1000, 2)));
    }
}
