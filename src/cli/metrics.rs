//! `--metrics`: the socket, its name, and when it is served.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::listen::{self, Place};
use crate::block::Graph;
use crate::err;
use crate::error::Result;
use crate::metrics::address::Address;
use crate::metrics::server::Listener;

/// A socket at which metrics are, or will be, served.
pub struct Metrics {
    listener: Listener,
    place: Option<Place>,
}

impl Metrics {
    /// A socket that will be at `address` when it is published; a port is there at once.
    ///
    /// # Errors
    /// In the words of other sockets' errors.
    pub fn listen(address: &Address) -> Result<Metrics> {
        let (listener, place) = match address {
            Address::Path(path) => {
                let (listener, place) = listen::at_path(path, Some(0o600))
                    .map_err(|e| e.prepend(format!("--metrics={path}: ")))?;
                (Listener::Unix(listener), Some(place))
            }
            Address::Port(port) => {
                let listener =
                    TcpListener::bind(port).map_err(|e| err!("--metrics={port}: {e}"))?;
                (Listener::Tcp(listener), None)
            }
        };
        Ok(Metrics { listener, place })
    }

    /// A predecessor's.
    pub fn adopt(listener: Listener, place: Option<Place>) -> Metrics {
        Metrics { listener, place }
    }

    /// Gives the socket its name.
    ///
    /// # Errors
    /// It cannot be moved there.
    pub fn publish(&mut self) -> Result<()> {
        self.place.as_mut().map_or(Ok(()), Place::publish)
    }

    /// Gives the socket to another user and group.
    ///
    /// # Errors
    /// Without the right to.
    pub fn give_to(&self, numbers: (Option<u32>, Option<u32>)) -> Result<()> {
        self.place.as_ref().map_or(Ok(()), |place| place.give_to(numbers))
    }

    /// Begins to serve what `graph` counts: when the process is in its sandbox, for this takes a thread.
    ///
    /// # Errors
    /// No threads or descriptors are left.
    pub fn serve(&self, graph: &Graph) -> Result<()> {
        self.listener.serve(graph.meters()).map_err(|e| err!("cannot serve metrics: {e}"))
    }

    /// For a successor.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Where it is, if at a path.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// The directory that it is in.
    pub fn dir(&self) -> Option<&Path> {
        self.place.as_ref().and_then(Place::dir)
    }

    /// A successor has it.
    pub fn leave(&mut self) {
        if let Some(place) = &mut self.place {
            place.leave();
        }
    }
}
