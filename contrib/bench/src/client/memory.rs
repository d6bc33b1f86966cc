//! The guest's memory as the back end is told of it: regions, plugged and unplugged, and the log of dirty pages.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::{Client, MemStyle};
use crate::error::{Error, Result};
use crate::mem::{GuestMem, RegionInfo};
use crate::proto::{F_LOG_ALL, mem_table, one_region, pf, req, vring_addr};

/// Bytes that a bit of the log stands for ("Migration").
const LOG_PAGE: u64 = 4096;

impl Client {
    /// Tells the back end of all memory regions, in the style of the options.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn share_memory(&self) -> Result<()> {
        let slots = match self.opts.mem_style {
            MemStyle::Auto => self.has_protocol(pf::CONFIGURE_MEM_SLOTS),
            MemStyle::Table => false,
            MemStyle::Slots => true,
        };
        let regions = self.mem.regions();
        if slots {
            return regions.iter().try_for_each(|(info, fd)| self.add_region(info, *fd));
        }
        let (infos, fds): (Vec<RegionInfo>, Vec<RawFd>) = regions.into_iter().unzip();
        self.conn.set(req::SET_MEM_TABLE, &mem_table(&infos), &fds)
    }

    fn add_region(&self, info: &RegionInfo, fd: RawFd) -> Result<()> {
        self.conn.set(req::ADD_MEM_REG, &one_region(info), &[fd])
    }

    /// Plugs memory: a new region, told by ADD_MEM_REG or a whole new table. Returns its index.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn plug_memory(&mut self, len: usize) -> Result<usize> {
        let index = self.mem.add_region(len)?;
        self.plug_region(index)?;
        Ok(index)
    }

    /// Tells of a region that was added to [`Client::mem`] at the end.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn plug_region(&mut self, index: usize) -> Result<()> {
        let table =
            self.opts.mem_style == MemStyle::Table || !self.has_protocol(pf::CONFIGURE_MEM_SLOTS);
        if table {
            self.share_memory()
        } else {
            let (info, fd) = self.mem.regions().swap_remove(index);
            self.add_region(&info, fd)
        }
    }

    /// Unplugs a region again, by REM_MEM_REG or a whole new table.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn unplug_memory(&mut self, index: usize) -> Result<()> {
        let info = self.mem.remove_region(index).ok_or(Error::OutOfMemory(index))?;
        let table =
            self.opts.mem_style == MemStyle::Table || !self.has_protocol(pf::CONFIGURE_MEM_SLOTS);
        if table {
            self.share_memory()
        } else {
            self.conn.set(req::REM_MEM_REG, &one_region(&info), &[])
        }
    }

    /// Has the back end log all pages of the guest's memory that it writes, used rings included, from now on. The log is in the memory
    /// that is returned, one bit a page.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn log_dirty(&mut self) -> Result<Arc<GuestMem>> {
        let end = self.mem.regions().iter().map(|(r, _)| r.gpa + r.len).max().unwrap_or(0);
        let len = (end / LOG_PAGE / 8 + 1).next_multiple_of(LOG_PAGE);
        let log = GuestMem::new(1, len as usize)?;
        self.conn.set_log_base(len, 0, log.regions()[0].1)?;
        self.conn.set_u64(req::SET_FEATURES, self.acked | F_LOG_ALL)?;
        for (i, w) in (0..).zip(&self.wiring) {
            let [desc, avail, used] = w.parts;
            let mem = self.mem.regions();
            let of =
                |(r, _): &&(RegionInfo, RawFd)| (r.user_addr..r.user_addr + r.len).contains(&used);
            let gpa = mem.iter().find(of).map_or(0, |(r, _)| used - r.user_addr + r.gpa);
            self.conn.set(req::SET_VRING_ADDR, &vring_addr(i, 1, desc, used, avail, gpa), &[])?;
        }
        Ok(log)
    }
}
