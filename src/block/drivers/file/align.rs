//! What alignment a file demands of its requests.
//!
//! Only direct I/O demands any. The kernel tells by `statx` (Linux 6.1 and a file system that fills it in), a block
//! device by its logical block size; else QEMU's way: read, and see what the kernel refuses.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::block::drivers::posix;

/// What is assumed where nothing can be found out, and the coarsest alignment tried.
const SAFE: u32 = 4096;
const TRIED: [u32; 4] = [512, 1024, 2048, SAFE];

/// Alignments in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::block::drivers) struct Alignment {
    /// Of offsets and lengths.
    pub(in crate::block::drivers) request: u32,
    /// Of memory.
    pub(in crate::block::drivers) memory: u32,
}

impl Alignment {
    const NONE: Alignment = Alignment { request: 1, memory: 1 };
}

/// Finds out the alignment of `file`, which is `len` bytes long and open with O_DIRECT if `direct`.
pub(in crate::block::drivers) fn probe(file: &File, len: u64, direct: bool) -> Alignment {
    if !direct {
        return Alignment::NONE;
    }
    if let Some((memory, request)) = posix::direct_io_alignment(file.as_fd()) {
        return Alignment { request: request.max(odd_end(file, len)), memory };
    }
    let request = posix::logical_block_size(file.as_fd()).unwrap_or_else(|_| try_requests(file));
    Alignment { request, memory: try_memory(file) }
}

/// QEMU takes 4096 for a file in which even a one-byte direct read works (it starts with a hole). What the kernel
/// tells is better for speed, but for a file with an odd end the answer decides whether it may be written at all:
/// there we give QEMU's.
fn odd_end(file: &File, len: u64) -> u32 {
    if len.is_multiple_of(u64::from(SAFE)) { 1 } else { try_requests(file) }
}

fn try_requests(file: &File) -> u32 {
    if works(file, 0, 1) {
        return SAFE;
    }
    TRIED.into_iter().find(|n| works(file, 0, *n)).unwrap_or(SAFE)
}

fn try_memory(file: &File) -> u32 {
    if works(file, 1, SAFE) {
        return SAFE;
    }
    TRIED.into_iter().find(|n| works(file, *n, SAFE)).unwrap_or(SAFE)
}

/// Whether the kernel takes a read of `len` bytes into memory `shift` bytes past an aligned address. Errors other
/// than EINVAL are about the disk, not about alignment.
fn works(file: &File, shift: u32, len: u32) -> bool {
    let (shift, len, safe) = (shift as usize, len as usize, SAFE as usize);
    let mut memory = vec![0u8; 3 * safe];
    let start = memory.as_ptr().align_offset(safe) + shift;
    match file.read_at(&mut memory[start..start + len], 0) {
        Ok(_) => true,
        Err(e) => e.raw_os_error() != Some(libc::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn buffered_files_demand_nothing() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(probe(&file, 0, false), Alignment::NONE);
    }

    #[test]
    fn direct_files_take_what_was_found() {
        let temp = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::write(temp.path(), vec![1u8; 8192]).unwrap();
        let direct =
            |path| File::options().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let file = direct(temp.path());
        let found = probe(&file, 8192, true);
        assert!(found.request.is_power_of_two() && (1..=SAFE).contains(&found.request));
        assert!(works(&file, found.memory % SAFE, found.request));
        let tried = Alignment { request: try_requests(&file), memory: try_memory(&file) };
        assert!(works(&file, tried.memory % SAFE, tried.request));
        // A hole takes any read: QEMU's answer is 4096, and counts where the end is odd.
        temp.as_file().set_len(0).unwrap();
        temp.as_file().set_len(1000).unwrap();
        let file = direct(temp.path());
        let qemu = if works(&file, 0, 1) { SAFE } else { found.request };
        assert_eq!(probe(&file, 1000, true).request, qemu.max(found.request));
    }
}
