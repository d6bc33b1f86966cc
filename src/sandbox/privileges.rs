//! Who the process is: its user and groups, and what privileges it has.
#![expect(unsafe_code, reason = "libc has no other way to this")]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::OnceLock;

use seccompiler::BpfProgram;

use crate::err;
use crate::error::{Errno, Error, Result};
use crate::sys;

/// `_LINUX_CAPABILITY_VERSION_3` of `linux/capability.h`: two words for each set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// The bit of CAP_IPC_LOCK.
const IPC_LOCK: u32 = 1 << 14;
/// Capability numbers fit 64 bits; the kernel says where they end.
const CAPABILITIES_MAX: libc::c_ulong = 64;
/// The longest entry of the user or group database, in bytes: a group may have many members.
const ENTRY_MAX: usize = 1 << 20;

/// Who to become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The number of the user, and the name that its supplementary groups are looked up by, if it has one.
    user: Option<(libc::uid_t, Option<CString>)>,
    group: Option<libc::gid_t>,
}

/// Who this process will be once it serves, as far as that is somebody else.
static FUTURE: OnceLock<(Option<libc::uid_t>, Option<libc::gid_t>)> = OnceLock::new();

/// Who is to own files that are made now and needed later: user and group, as far as they are not who makes them.
pub fn owner() -> (Option<libc::uid_t>, Option<libc::gid_t>) {
    FUTURE.get().copied().unwrap_or_default()
}

/// The part of an entry that matters.
struct User {
    name: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
}

impl Identity {
    /// The user and group with these names or numbers. A user comes with its group unless another is given.
    ///
    /// # Errors
    /// Nobody has that name; a number without an entry, and no group.
    pub fn find(user: Option<&str>, group: Option<&str>) -> Result<Identity> {
        let group = group.map(find_group).transpose()?;
        let Some(text) = user else { return Ok(Identity { user: None, group }) };
        let failed = |e| Error::from_errno(format!("--user={text}"), e);
        let number = text.parse::<libc::uid_t>().ok().filter(|n| *n != libc::uid_t::MAX);
        let found = match number {
            Some(number) => user_entry(&Key::Number(number)),
            None => user_entry(&Key::Name(&c_string(text)?)),
        };
        match (found.map_err(failed)?, number) {
            (Some(User { name, uid, gid }), _) => {
                Ok(Identity { user: Some((uid, Some(name))), group: group.or(Some(gid)) })
            }
            (None, Some(number)) if group.is_some() => {
                Ok(Identity { user: Some((number, None)), group })
            }
            (None, Some(_)) => Err(err!("--user={text}: has no entry: give a --group, too")),
            (None, None) => Err(err!("--user={text}: there is no such user")),
        }
    }

    /// The numbers of user and group, as far as they are to change.
    pub fn numbers(&self) -> (Option<libc::uid_t>, Option<libc::gid_t>) {
        (self.user.as_ref().map(|(uid, _)| *uid), self.group)
    }

    /// Says that the process will become this: see [`owner`].
    pub fn announce(&self) {
        let _ = FUTURE.set(self.numbers());
    }

    /// Becomes this, with all threads, for ever.
    ///
    /// # Errors
    /// EPERM without the right to (CAP_SETUID, CAP_SETGID), and what else the kernel says.
    pub fn assume(&self) -> io::Result<()> {
        if let Some(gid) = self.group {
            let name = self.user.as_ref().and_then(|(_, name)| name.as_ref());
            // SAFETY: the name is a C string; one group is read through the pointer, which lives through the call.
            check(unsafe {
                match name {
                    Some(name) => libc::initgroups(name.as_ptr(), gid),
                    None => libc::setgroups(1, &raw const gid),
                }
            })?;
            // SAFETY: no memory is passed.
            check(unsafe { libc::setresgid(gid, gid, gid) })?;
        }
        if let Some((uid, _)) = self.user {
            // SAFETY: no memory is passed.
            check(unsafe { libc::setresuid(uid, uid, uid) })?;
        }
        Ok(())
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| err!("'{text}': a name has no zero byte"))
}

/// What to look for in a database.
enum Key<'a> {
    Name(&'a CString),
    Number(u32),
}

/// The entry that `get` finds with a buffer that is large enough: it answers an error number, and whether it found one.
fn with_buffer<T>(
    mut get: impl FnMut(&mut [u8]) -> (i32, Option<T>),
) -> std::result::Result<Option<T>, Errno> {
    let mut buffer = vec![0; 4096];
    loop {
        match get(&mut buffer) {
            (0, entry) => return Ok(entry),
            // Each of these means that there is none, depending on the database.
            (libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM, _) => return Ok(None),
            (libc::EINTR, _) => {}
            (libc::ERANGE, _) if buffer.len() < ENTRY_MAX => buffer.resize(buffer.len() * 4, 0),
            (errno, _) => return Err(Errno(errno)),
        }
    }
}

fn user_entry(key: &Key<'_>) -> std::result::Result<Option<User>, Errno> {
    with_buffer(|buffer| {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let (mut found, at, len) = (null_mut(), buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: all pointers are valid for the call, and `len` is the buffer's length; `found` is null or the entry,
        // filled, with strings in the buffer, which both live until they have been copied.
        unsafe {
            let rc = match key {
                Key::Name(name) => {
                    libc::getpwnam_r(name.as_ptr(), entry.as_mut_ptr(), at, len, &raw mut found)
                }
                Key::Number(uid) => {
                    libc::getpwuid_r(*uid, entry.as_mut_ptr(), at, len, &raw mut found)
                }
            };
            let user = found.as_ref().filter(|_| rc == 0).map(|entry| User {
                name: std::ffi::CStr::from_ptr(entry.pw_name).to_owned(),
                uid: entry.pw_uid,
                gid: entry.pw_gid,
            });
            (rc, user)
        }
    })
}

fn find_group(text: &str) -> Result<libc::gid_t> {
    if let Some(number) = text.parse::<libc::gid_t>().ok().filter(|n| *n != libc::gid_t::MAX) {
        return Ok(number);
    }
    let name = c_string(text)?;
    let found = with_buffer(|buffer| {
        let mut entry = MaybeUninit::<libc::group>::uninit();
        let (mut found, at, len) = (null_mut(), buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: as for users.
        unsafe {
            let rc = libc::getgrnam_r(name.as_ptr(), entry.as_mut_ptr(), at, len, &raw mut found);
            (rc, found.as_ref().filter(|_| rc == 0).map(|entry| entry.gr_gid))
        }
    });
    match found {
        Ok(Some(gid)) => Ok(gid),
        Ok(None) => Err(err!("--group={text}: there is no such group")),
        Err(errno) => Err(Error::from_errno(format!("--group={text}"), errno)),
    }
}

/// Makes the calling thread, and those that it starts, unable to gain privileges by running another program.
///
/// # Errors
/// A kernel before 3.5.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// Has the system calls of the calling thread, and of those that it starts, go through one more filter; refusals are `logged` by
/// the kernel if it can (4.14).
///
/// # Errors
/// EINVAL or ENOSYS from a kernel without filters, and what else the kernel says.
pub fn filter_calls(filter: &BpfProgram, logged: bool) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let at = filter.as_ptr().cast_mut().cast();
    let program = libc::sock_fprog { len, filter: at };
    let apply = |flags: libc::c_ulong| {
        let (call, mode) = (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER);
        // SAFETY: the kernel copies `len` instructions, which `filter` has: it is borrowed, and of the kernel's layout.
        let result = unsafe { libc::syscall(call, mode, flags, &raw const program) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    match logged {
        true => apply(libc::SECCOMP_FILTER_FLAG_LOG).or_else(|_| apply(0)),
        false => apply(0),
    }
}

/// Makes the calling thread, and those that it starts, unable to gain capabilities. To be called before the process becomes
/// another user, who may not do this; nothing happens without the right to (CAP_SETPCAP).
pub fn bound_capabilities() {
    for capability in 0..CAPABILITIES_MAX {
        // SAFETY: no memory is passed. It fails after the last one, and for who may not: then there are none to keep.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// Drops all capabilities of the calling thread, and of those that it starts; but not CAP_IPC_LOCK where the memory that
/// may be locked is limited.
///
/// # Errors
/// What the kernel says.
pub fn drop_capabilities() -> io::Result<()> {
    let header = [CAPABILITY_VERSION, 0];
    // Effective, permitted, inheritable; twice.
    let set = |sets: [u32; 6]| {
        // SAFETY: the kernel reads a header of two words, for this thread, and two structs of three words each.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // Refused if it was not there.
    if !sys::locks_without_limit() && set([IPC_LOCK, IPC_LOCK, 0, 0, 0, 0]).is_ok() {
        return Ok(());
    }
    set([0; 6])
}
