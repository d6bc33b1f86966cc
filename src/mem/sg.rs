//! Scatter lists over memory that others may write at any time.
//!
//! [`IoVec`] is the kernel's `struct iovec`; [`Sg`] is a borrowed window (`skip`, `len`) over an array of them. The
//! memory behind a list is volatile: it is copied from or to, or handed to the kernel, never borrowed.
//!
//! Invariant: whoever makes an [`IoVec`] from raw parts guarantees that the range stays mapped and readable and
//! writable for as long as any `Sg` that reaches it lives. For guest memory the request keeps the
//! [`GuestMap`](super::GuestMap) alive; for bounce buffers the buffer outlives the operation.

use std::marker::PhantomData;

/// One contiguous range of memory; layout of `struct iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an `IoVec` is an address and a length; the memory behind it is only touched by volatile copies or by the
// kernel, which may happen from any thread.
unsafe impl Send for IoVec {}
// SAFETY: as above; the value itself is immutable.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// A range of no bytes.
    pub const EMPTY: IoVec = IoVec(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });

    /// A range of `len` bytes at `base`.
    ///
    /// # Safety
    /// `base..base + len` must stay mapped, readable and writable while this value (or a copy) is used.
    pub const unsafe fn new(base: *mut u8, len: usize) -> Self {
        IoVec(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// The address of the first byte.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The part `[skip, skip + len)` of this range.
    ///
    /// # Panics
    /// If the part is not inside the range.
    pub fn part(&self, skip: usize, len: usize) -> IoVec {
        assert!(skip <= self.len() && len <= self.len() - skip, "part outside of its range");
        IoVec(libc::iovec { iov_base: self.base().wrapping_add(skip).cast(), iov_len: len })
    }

    /// Its first bytes, if it has so many: two volatile loads, wherever they lie.
    #[inline]
    pub fn first(&self) -> Option<[u8; 16]> {
        /// Aligned to nothing.
        #[repr(C, packed)]
        struct Words(u64, u64);
        if self.len() < size_of::<Words>() {
            return None;
        }
        // SAFETY: the maker guarantees the range, which has sixteen bytes.
        let Words(low, high) = unsafe { self.base().cast::<Words>().read_volatile() };
        Some((u128::from(low.to_le()) | u128::from(high.to_le()) << 64).to_le_bytes())
    }

    /// Sets its first byte.
    ///
    /// # Panics
    /// If it has none.
    #[inline]
    pub fn set_first(&self, byte: u8) {
        assert!(!self.is_empty(), "no byte there");
        // SAFETY: the maker guarantees the range, which has a byte.
        unsafe { self.base().write_volatile(byte) };
    }
}

/// A window of `len` bytes, `skip` bytes into an array of ranges. `Copy`; allocates nothing.
#[derive(Clone, Copy)]
pub struct Sg<'a> {
    /// The first range that the window touches is `iov[0]`.
    iov: *const IoVec,
    count: usize,
    skip: usize,
    len: usize,
    lifetime: PhantomData<&'a [IoVec]>,
}

// SAFETY: an `Sg` is a shared borrow of an array of `IoVec`, which is `Sync`.
unsafe impl Send for Sg<'_> {}
// SAFETY: as above.
unsafe impl Sync for Sg<'_> {}

impl<'a> Sg<'a> {
    /// A window over all bytes of `iov`.
    pub fn new(iov: &'a [IoVec]) -> Self {
        let len = iov.iter().map(IoVec::len).sum();
        Sg { iov: iov.as_ptr(), count: iov.len(), skip: 0, len, lifetime: PhantomData }
    }

    /// The window's length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn ranges(&self) -> &'a [IoVec] {
        // SAFETY: `iov` and `count` come from a slice borrowed for 'a (`new`), or are a suffix of one (`slice`).
        unsafe { std::slice::from_raw_parts(self.iov, self.count) }
    }

    /// The part `[offset, offset + len)` of this window.
    ///
    /// # Panics
    /// If the part is not inside the window.
    pub fn slice(&self, offset: usize, len: usize) -> Sg<'a> {
        assert!(offset <= self.len && len <= self.len - offset, "slice outside of its window");
        let mut skip = self.skip + offset;
        let mut ranges = self.ranges();
        while let [first, rest @ ..] = ranges {
            if skip < first.len() {
                break;
            }
            skip -= first.len();
            ranges = rest;
        }
        Sg { iov: ranges.as_ptr(), count: ranges.len(), skip, len, lifetime: PhantomData }
    }

    /// The non-empty contiguous ranges of the window, in order.
    pub fn iter(&self) -> impl Iterator<Item = IoVec> + 'a {
        let (mut skip, mut left) = (self.skip, self.len);
        self.ranges().iter().filter_map(move |v| {
            let from = skip.min(v.len());
            skip -= from;
            let n = left.min(v.len() - from);
            left -= n;
            (n > 0).then(|| v.part(from, n))
        })
    }

    /// The window as an array that the kernel can take, if it needs no copying. None of its ranges is empty: older
    /// kernels check the alignment of those, too.
    pub fn as_kernel_iov(&self) -> Option<&'a [IoVec]> {
        let ranges = self.ranges();
        if self.skip != 0 {
            return None;
        }
        let mut left = self.len;
        for (i, v) in ranges.iter().enumerate() {
            if v.is_empty() || v.len() > left {
                return None;
            }
            left -= v.len();
            if left == 0 {
                return Some(&ranges[..=i]);
            }
        }
        (self.len == 0).then_some(&[])
    }

    /// All addresses and lengths of the window or-ed together: its low bits tell the alignment.
    pub fn alignment_bits(&self) -> usize {
        self.iter().fold(0, |bits, v| bits | v.base().addr() | v.len())
    }

    /// Copies `from` into the window.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len, "copy of another length");
        let mut done = 0;
        for v in self.iter() {
            // SAFETY: the maker of the `IoVec` guarantees the destination (see the module's invariant); the source
            // is a slice of at least `done + v.len()` bytes and ordinary memory that cannot overlap guest memory.
            unsafe { std::ptr::copy_nonoverlapping(from[done..].as_ptr(), v.base(), v.len()) };
            done += v.len();
        }
    }

    /// Copies the window into `to`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len, "copy of another length");
        let mut done = 0;
        for v in self.iter() {
            // SAFETY: as in `copy_from`, with source and destination exchanged.
            unsafe { std::ptr::copy_nonoverlapping(v.base(), to[done..].as_mut_ptr(), v.len()) };
            done += v.len();
        }
    }

    /// Fills the window with zeroes.
    pub fn zero(&self) {
        for v in self.iter() {
            // SAFETY: the maker of the `IoVec` guarantees the range (see the module's invariant).
            unsafe { std::ptr::write_bytes(v.base(), 0, v.len()) };
        }
    }

    /// Whether every byte of the window was zero when it was looked at.
    pub fn is_zero(&self) -> bool {
        self.iter().all(|v| {
            let (head, len) = (v.base(), v.len());
            let lead = head.align_offset(8).min(len);
            let words = (len - lead) / 8;
            let byte = |i: usize| {
                // SAFETY: `i < len`, inside the range that the maker of the `IoVec` guarantees; volatile, because
                // the guest may write it meanwhile.
                unsafe { head.add(i).read_volatile() == 0 }
            };
            let word = |i: usize| {
                // SAFETY: as above for the eight bytes from `lead + 8 * i`, aligned because `lead` is.
                unsafe { head.add(lead + 8 * i).cast::<u64>().read_volatile() == 0 }
            };
            (0..lead).all(byte) && (0..words).all(word) && (lead + words * 8..len).all(byte)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(parts: &mut [Vec<u8>]) -> Vec<IoVec> {
        // SAFETY: the vectors outlive the list in every test below.
        parts.iter_mut().map(|p| unsafe { IoVec::new(p.as_mut_ptr(), p.len()) }).collect()
    }

    proptest! {
        #[test]
        fn windows_agree_with_a_flat_copy(
            lens in proptest::collection::vec(0usize..40, 1..8),
            cut in (0usize..300, 0usize..300),
            again in (0usize..300, 0usize..300),
        ) {
            let mut n = 0u8;
            let mut parts: Vec<Vec<u8>> = lens
                .iter()
                .map(|len| (0..*len).map(|_| { n = n.wrapping_add(1); n }).collect())
                .collect();
            let mut flat: Vec<u8> = parts.concat();
            let iov = list(&mut parts);
            let whole = Sg::new(&iov);
            prop_assert_eq!(whole.len(), flat.len());
            let clip = |(a, b): (usize, usize), len: usize| { let a = a.min(len); (a, b.min(len - a)) };
            let (o1, l1) = clip(cut, flat.len());
            let (o2, l2) = clip(again, l1);
            let sg = whole.slice(o1, l1).slice(o2, l2);
            let want = &mut flat[o1 + o2..o1 + o2 + l2];
            let mut got = vec![0; l2];
            sg.copy_to(&mut got);
            prop_assert_eq!(&got[..], &want[..]);
            prop_assert_eq!(sg.iter().map(|v| v.len()).sum::<usize>(), l2);
            if let Some(k) = sg.as_kernel_iov() {
                prop_assert_eq!(k.iter().map(IoVec::len).sum::<usize>(), l2);
                prop_assert!(k.iter().all(|v| !v.is_empty()));
            }
            prop_assert_eq!(sg.is_zero(), l2 == 0 || want.iter().all(|b| *b == 0));
            sg.zero();
            prop_assert!(sg.is_zero());
            let bytes: Vec<u8> = (0..l2).map(|i| u8::try_from(i % 251).unwrap()).collect();
            sg.copy_from(&bytes);
            want.copy_from_slice(&bytes);
            drop(iov);
            prop_assert_eq!(parts.concat(), flat);
        }
    }

    #[test]
    fn first_bytes_are_there_or_not() {
        let mut parts = vec![(0..17).collect::<Vec<u8>>()];
        let whole = list(&mut parts)[0];
        whole.part(1, 16).set_first(99);
        let want = [99, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        assert_eq!(whole.part(1, 16).first(), Some(want), "at an odd address");
        assert_eq!(whole.part(1, 15).first(), None);
        assert_eq!(parts[0][0], 0);
    }

    #[test]
    fn alignment_sees_every_part() {
        let mut parts = vec![vec![0u8; 512], vec![0u8; 3]];
        let iov = list(&mut parts);
        assert_eq!(Sg::new(&iov).alignment_bits() & 1, 1);
    }
}
