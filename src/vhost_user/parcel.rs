//! What one process hands to another in one piece: a JSON document and the open files that it refers to.
//!
//! A file is in the document as its place in the list of files. Files are taken out one by one: none is used twice, and what
//! nobody takes is closed with the parcel.
#![forbid(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use serde_json::Value;

use crate::err;
use crate::error::Result;

/// A document and its files.
#[derive(Debug, Default)]
pub struct Parcel {
    /// The document.
    pub body: Value,
    files: Vec<Option<OwnedFd>>,
}

impl From<Value> for Parcel {
    /// Without files.
    fn from(body: Value) -> Parcel {
        Parcel { body, files: Vec::new() }
    }
}

impl Parcel {
    /// What came over a socket.
    pub fn received(body: Value, files: Vec<OwnedFd>) -> Parcel {
        Parcel { body, files: files.into_iter().map(Some).collect() }
    }

    /// Puts a duplicate of `file` in; what stands for it in the document.
    ///
    /// # Errors
    /// No room for more descriptors.
    pub fn put(&mut self, file: BorrowedFd<'_>) -> Result<Value> {
        let file = file.try_clone_to_owned();
        let file = file.map_err(|e| err!("cannot duplicate a file descriptor: {e}"))?;
        self.files.push(Some(file));
        Ok(Value::from(self.files.len() - 1))
    }

    /// [`Parcel::put`], or null.
    ///
    /// # Errors
    /// No room for more descriptors.
    pub fn put_if(&mut self, file: Option<BorrowedFd<'_>>) -> Result<Value> {
        file.map_or(Ok(Value::Null), |file| self.put(file))
    }

    /// Takes the file out that `place` stands for.
    ///
    /// # Errors
    /// There is none, or it has been taken.
    pub fn take(&mut self, place: &Value) -> Result<OwnedFd> {
        let at = place.as_u64().and_then(|at| usize::try_from(at).ok());
        let file = at.and_then(|at| self.files.get_mut(at)).and_then(Option::take);
        file.ok_or_else(|| err!("there is no file {place}"))
    }

    /// [`Parcel::take`], if `place` is not null.
    ///
    /// # Errors
    /// There is none, or it has been taken.
    pub fn take_if(&mut self, place: &Value) -> Result<Option<OwnedFd>> {
        if place.is_null() { Ok(None) } else { self.take(place).map(Some) }
    }

    /// The files that are still in it.
    pub fn files(&self) -> impl Iterator<Item = &OwnedFd> {
        self.files.iter().flatten()
    }
}

/// The number `name` of `from`, in the range of its type.
///
/// # Errors
/// There is none.
pub fn number<T: TryFrom<u64>>(from: &Value, name: &str) -> Result<T> {
    let number = from[name].as_u64().and_then(|n| T::try_from(n).ok());
    number.ok_or_else(|| err!("'{name}' is {}", from[name]))
}

/// The flag `name` of `from`.
///
/// # Errors
/// There is none.
pub fn flag(from: &Value, name: &str) -> Result<bool> {
    from[name].as_bool().ok_or_else(|| err!("'{name}' is {}", from[name]))
}

/// The text `name` of `from`.
///
/// # Errors
/// There is none.
pub fn text<'a>(from: &'a Value, name: &str) -> Result<&'a str> {
    from[name].as_str().ok_or_else(|| err!("'{name}' is {}", from[name]))
}

/// The list `name` of `from`.
///
/// # Errors
/// There is none.
pub fn list<'a>(from: &'a Value, name: &str) -> Result<&'a [Value]> {
    from[name].as_array().map(Vec::as_slice).ok_or_else(|| err!("'{name}' is {}", from[name]))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_is_taken_once() {
        let file = tempfile::tempfile().unwrap();
        let mut parcel = Parcel::default();
        let place = parcel.put(file.as_fd()).unwrap();
        assert_eq!(parcel.put_if(None).unwrap(), Value::Null);
        assert!(parcel.take(&json!(1)).is_err());
        assert!(parcel.take(&json!("0")).is_err());
        assert!(parcel.take_if(&Value::Null).unwrap().is_none());
        parcel.take(&place).unwrap();
        assert!(parcel.take(&place).is_err());
        assert_eq!(parcel.files().count(), 0);
    }

    #[test]
    fn what_is_missing_or_out_of_range_is_an_error() {
        let from = json!({"n": 65536, "f": true, "t": "x", "l": []});
        assert_eq!(number::<u32>(&from, "n").unwrap(), 65536);
        assert_eq!(number::<u16>(&from, "n").unwrap_err().message(), "'n' is 65536");
        assert!(flag(&from, "f").unwrap() && flag(&from, "n").is_err());
        assert!(text(&from, "t").is_ok() && text(&from, "l").is_err());
        assert!(list(&from, "l").is_ok() && list(&from, "x").is_err());
    }
}
