//! Reads and writes of metadata on a `file` node, at any offset and of any length.
//!
//! What is past the end of the file reads as zeroes, as QEMU's file driver has it; the callers complain about such
//! references by themselves. Writes past the end make the file longer.
#![forbid(unsafe_code)]

use super::super::header::Header;
use crate::block::{Node, Op, WriteFlags};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::Buffer;

/// The longest single transfer: tables are larger than that.
const PIECE: usize = 1 << 20;
/// What every direct I/O is content with.
const ALIGN: usize = 4096;

/// A file node, for metadata.
#[derive(Clone, Copy)]
pub(in super::super) struct Disk<'a> {
    file: &'a Node,
}

impl<'a> Disk<'a> {
    pub(in super::super) fn new(file: &'a Node) -> Disk<'a> {
        Disk { file }
    }

    /// The file's length in bytes, in whole sectors.
    pub(in super::super) fn len(&self) -> u64 {
        self.file.len()
    }

    /// `len` bytes at `offset`.
    pub(in super::super) async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(Errno::EIO);
        }
        let mut out = vec![0; len];
        let inside = self.len().saturating_sub(offset).min(len as u64);
        let inside = usize::try_from(inside).unwrap_or(len);
        if inside > 0 {
            let buffer = Buffer::new(inside.min(PIECE), ALIGN);
            let mut at = offset;
            for piece in out[..inside].chunks_mut(PIECE) {
                let iov = [buffer.iovec().part(0, piece.len())];
                self.file.submit(Op::Read { offset: at, to: Sg::new(&iov) }).await?;
                piece.copy_from_slice(&buffer.bytes()[..piece.len()]);
                at += piece.len() as u64;
            }
        }
        Ok(out)
    }

    /// The bytes that parsing the header wants: see [`Header::extent`].
    pub(in super::super) async fn read_cluster0(&self) -> Result<Vec<u8>, Errno> {
        let first = self.read(0, 512).await?;
        match Header::extent(&first) {
            512 => Ok(first),
            len => self.read(0, len).await,
        }
    }

    /// `len` bytes at `offset` in one transfer, without a copy: for what is known to be short and inside of the file.
    pub(in super::super) async fn fetch(&self, offset: u64, len: u64) -> Result<Buffer, Errno> {
        let buffer = Buffer::new(usize::try_from(len).map_err(|_| Errno::EIO)?, ALIGN);
        let iov = [buffer.iovec()];
        self.file.submit(Op::Read { offset, to: Sg::new(&iov) }).await?;
        Ok(buffer)
    }

    /// Stores `bytes` at `offset` in one transfer: for what is known to be short and to have room.
    pub(in super::super) async fn store(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut buffer = Buffer::new(bytes.len(), ALIGN);
        buffer.bytes_mut().copy_from_slice(bytes);
        let iov = [buffer.iovec()];
        let flags = WriteFlags::empty();
        self.file.submit(Op::Write { offset, from: Sg::new(&iov), flags }).await
    }

    /// `count` big-endian numbers at `offset`.
    pub(in super::super) async fn read_words(
        &self,
        offset: u64,
        count: usize,
    ) -> Result<Vec<u64>, Errno> {
        let mut words = Vec::new();
        while words.len() < count {
            let at = offset.checked_add(8 * words.len() as u64).ok_or(Errno::EIO)?;
            let bytes = self.read(at, 8 * (count - words.len()).min(PIECE / 8)).await?;
            words.extend(words_of(&bytes));
        }
        Ok(words)
    }

    /// Stores `bytes` at `offset`; the file grows if need be.
    pub(in super::super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(bytes.len() as u64).ok_or(Errno(libc::EFBIG))?;
        self.grow(end).await?;
        let mut buffer = Buffer::new(bytes.len().min(PIECE), ALIGN);
        let mut at = offset;
        for piece in bytes.chunks(PIECE) {
            buffer.bytes_mut()[..piece.len()].copy_from_slice(piece);
            let iov = [buffer.iovec().part(0, piece.len())];
            let flags = WriteFlags::empty();
            self.file.submit(Op::Write { offset: at, from: Sg::new(&iov), flags }).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes the file at least `end` bytes long. What is new reads as zeroes.
    ///
    /// The generic layer takes no request past a node's end: the driver itself is asked to write the last block, which
    /// drivers of growing media answer by growing.
    pub(in super::super) async fn grow(&self, end: u64) -> Result<(), Errno> {
        if end <= self.len() {
            return Ok(());
        }
        let align = u64::from(self.file.driver().limits().request_align);
        let end = end.checked_next_multiple_of(align).ok_or(Errno(libc::EFBIG))?;
        let buffer = Buffer::new(usize::try_from(align).unwrap_or(ALIGN), ALIGN);
        let iov = [buffer.iovec()];
        let (offset, flags) = (end - align, WriteFlags::empty());
        if offset < self.len() {
            // The file ends within this block: what is there stays. Past the end it reads as zeroes.
            let to = Sg::new(&iov);
            self.file.driver().submit(Op::Read { offset, to }).await?;
        }
        self.file.driver().submit(Op::Write { offset, from: Sg::new(&iov), flags }).await?;
        if end > self.len() { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    /// The content of a range is no longer needed. A hint: that it fails does not matter.
    pub(in super::super) async fn discard(&self, offset: u64, len: u64) {
        let len = len.min(self.len().saturating_sub(offset));
        if len > 0
            && let Err(e) = self.file.submit(Op::Discard { offset, len }).await
        {
            log::debug!("discard at {offset}: {e}");
        }
    }

    /// Everything written so far is on stable storage.
    pub(in super::super) async fn flush(&self) -> Result<(), Errno> {
        self.file.submit(Op::Flush).await
    }
}

/// Big-endian numbers, one after the other.
pub(in super::super) fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}
