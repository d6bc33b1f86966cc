//! All exports of a process, paused with their images closed; and opened anew, here or in another process.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::save_place;
use crate::block::opener;
use crate::cli::exports::Running;
use crate::cli::listen::Place;
use crate::cli::session::Session;
use crate::err;
use crate::error::Result;
use crate::qapi::Options;
use crate::vhost_user::parcel::{Parcel, flag, number, text};
use crate::vhost_user::{Device, Server, Suspended};
use crate::virtio::blk::CONFIG_WCE;

/// What is paused. Dropping it does what is safe: servers that served go on, servers that are new end. Must go before the
/// session does, whose servers wait for their verdicts.
#[derive(Default)]
pub struct Paused {
    servers: Vec<Suspended>,
    /// Which exports were active, in their order.
    active: Vec<bool>,
    /// What to open the nodes from, if they are closed.
    closed: Option<Vec<Options>>,
}

impl Paused {
    /// Whether anything has paused, or will.
    pub fn is_begun(&self) -> bool {
        !self.servers.is_empty()
    }

    /// All serve (on).
    pub fn resume(self) {
        self.servers.into_iter().for_each(Suspended::resume);
    }

    /// All end.
    pub fn end(self) {
        self.servers.into_iter().for_each(Suspended::end);
    }
}

impl Session {
    /// Where the exports' sockets are.
    pub fn places(&self) -> Vec<Value> {
        self.exports.list.iter().map(|running| save_place(running.place.as_ref())).collect()
    }

    /// Puts the sockets in their places, in the order of [`Session::places`].
    pub fn set_places(&mut self, places: Vec<Option<Place>>) {
        for (running, place) in self.exports.list.iter_mut().zip(places) {
            running.place = place;
        }
    }

    /// Leaves the sockets where they are: they are another process's.
    pub fn leave_places(&mut self) {
        let places = self.exports.list.iter_mut().filter_map(|running| running.place.as_mut());
        places.for_each(Place::leave);
    }

    /// Whether everything could be paused now, and opened again.
    ///
    /// # Errors
    /// It could not.
    pub fn check_pausable(&self) -> Result<()> {
        for Running { id, export, .. } in &self.exports.list {
            if export.is_holding() {
                return Err(err!(
                    "export '{id}': requests that failed wait for the storage (SIGUSR1 tries them again)"
                ));
            }
        }
        opener::check_openable(&self.graph.all_definitions())
    }

    /// Pauses all exports, and closes all nodes; what their successors need, in order. What has been done, also before an
    /// error, is in `paused`.
    ///
    /// # Errors
    /// A request or a message does not end by `deadline`; a flush fails; an image cannot be closed cleanly.
    pub fn pause(&mut self, paused: &mut Paused, deadline: Instant) -> Result<Vec<Parcel>> {
        let list = &self.exports.list;
        paused.active = list.iter().map(|running| running.export.is_active()).collect();
        // All at the same time.
        for Running { id, server, .. } in list {
            let server = server.as_ref().ok_or_else(|| err!("export '{id}': not served"))?;
            let suspended = server.suspend().map_err(|e| err!("export '{id}': {e}"))?;
            paused.servers.push(suspended);
        }
        let mut parcels = Vec::new();
        for ((Running { id, export, .. }, suspended), active) in
            list.iter().zip(&paused.servers).zip(&paused.active)
        {
            let mut parcel = suspended.wait(deadline).map_err(|e| err!("export '{id}': {e}"))?;
            let mut wce = [0];
            export.read_config(CONFIG_WCE, &mut wce);
            parcel.body = json!({
                "id": id, "active": active, "wce": wce[0], "serves": parcel.body,
            });
            parcels.push(parcel);
        }
        for Running { export, .. } in list.iter().filter(|running| running.export.is_auto()) {
            export.deactivate()?;
        }
        self.close_nodes(paused)?;
        Ok(parcels)
    }

    fn close_nodes(&self, paused: &mut Paused) -> Result<()> {
        let mut users = Vec::new();
        for Running { export, .. } in &self.exports.list {
            users.extend(export.let_go()?);
        }
        let (definitions, closed) = opener::close_all(&self.graph, users);
        paused.closed = Some(definitions);
        closed
    }

    /// Opens the nodes again, as far as they are closed, for the exports that were active.
    ///
    /// # Errors
    /// One cannot be opened, or is in use elsewhere: all are closed again.
    pub fn reopen(&self, paused: &mut Paused) -> Result<()> {
        if let Some(definitions) = &paused.closed {
            opener::open_all(&self.graph, definitions)?;
            paused.closed = None;
        }
        let opened = self.take_up(&paused.active);
        if opened.is_err()
            && let Err(e) = self.close_nodes(paused)
        {
            log::error!("{e}");
        }
        opened
    }

    fn take_up(&self, active: &[bool]) -> Result<()> {
        for (Running { export, .. }, active) in self.exports.list.iter().zip(active) {
            match (*active, export.is_auto()) {
                (true, true) => export.activate()?,
                (true, false) => export.take_up()?,
                (false, _) => {}
            }
        }
        Ok(())
    }

    /// Whether the images that were only looked at may be opened as they are going to be.
    ///
    /// # Errors
    /// One may not.
    pub fn check_openable(&self) -> Result<()> {
        opener::check_openable(&self.to_open)
    }

    /// Opens what was only looked at so far, and goes on with what `parcels` describe, the answer to [`Session::pause`]. All
    /// exports pause afterwards.
    ///
    /// # Errors
    /// An image cannot be opened, or something is not as it was there.
    pub fn adopt(
        &mut self,
        parcels: Vec<Parcel>,
        paused: &mut Paused,
        deadline: Instant,
    ) -> Result<()> {
        if parcels.len() != self.exports.list.len() {
            return Err(err!("{} exports, not {}", self.exports.list.len(), parcels.len()));
        }
        paused.active = parcels.iter().map(|p| flag(&p.body, "active")).collect::<Result<_>>()?;
        paused.closed = Some(std::mem::take(&mut self.to_open));
        self.reopen(paused)?;
        for (running, parcel) in self.exports.list.iter_mut().zip(parcels) {
            let (server, suspended) = adopt(running, parcel, deadline)
                .map_err(|e| err!("export '{}': {e}", running.id))?;
            running.export.set_config_change(server.config_change());
            running.server = Some(server);
            paused.servers.push(suspended);
        }
        Ok(())
    }
}

fn adopt(running: &Running, mut parcel: Parcel, deadline: Instant) -> Result<(Server, Suspended)> {
    let body = std::mem::take(&mut parcel.body);
    let id = text(&body, "id")?;
    if id != running.id {
        return Err(err!("the predecessor has '{id}' here"));
    }
    running.export.write_config(CONFIG_WCE, &[number(&body, "wce")?]);
    parcel.body = body["serves"].clone();
    // The end of the only connection there will ever be is the end of the program.
    let on_finish: Box<dyn FnOnce() + Send> = match &parcel.body["listener"] {
        Value::Null => Box::new(crate::sys::stop_process),
        _ => Box::new(|| {}),
    };
    let device = Arc::clone(&running.export);
    Server::adopt(parcel, device, running.id.clone(), on_finish, deadline)
}
