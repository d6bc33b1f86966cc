//! Opening an image: QEMU's order of checks, so that the same image fails with the same words.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::Value;

use super::cache::SliceCache;
use super::check::disk::Disk;
use super::compressed::Decompressor;
use super::flight::Flights;
use super::header::{Autoclear, Header, Incompatible, Purpose};
use super::l1::L1Table;
use super::opened::{self, Found};
use super::options::Choices;
use super::read::Corruption;
use super::replay;
use super::tidy::Tidy;
use super::write::Writing;
use super::{Image, QCOW2, Qcow2};
use crate::block::{Driver, Edge, Node, OpenArgs, Role};
use crate::err;
use crate::error::{Errno, Error, Result};
use crate::metrics::NodeMeter;
use crate::rt;

/// Opens a node.
///
/// # Errors
/// In QEMU's words.
pub fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let purpose = if args.in_force.read_only { Purpose::Read } else { Purpose::Write };
    let file = args.open_child("file", Role::File)?;
    args.enter_file(&file)?;
    let cluster0 = read_header(&file.node)?;
    let mut header = Header::parse(&cluster0)?;
    header.check_limits(purpose)?;
    let l1 = read_l1(&file.node, &header)?;
    let choices = Choices::take(args, &header)?;
    let reftable = match purpose {
        Purpose::Write => opened::read_reftable(&file.node, &header)?,
        Purpose::Read | Purpose::Check => Vec::new(),
    };
    header.parse_extensions(&cluster0)?;
    warn_of_stale_bitmaps(&header);
    let mut edges = vec![file];
    edges.extend(open_data_file(args, &header)?);
    let data = edges.len() - 1;
    header.parse_backing_file(&cluster0)?;
    let snapshots = opened::judge(&edges[0].node, &header)?;
    let (state_dir, mut journal) = (args.graph.state_dir(), None);
    let (header, l1, found) = match purpose {
        Purpose::Write => {
            let found = Found { header, l1, reftable, snapshots };
            let nodes = (&*edges[0].node, &*edges[data].node);
            let left = replay::open(nodes, &found, state_dir, args.node_name)?;
            let (header, l1, all) =
                found.into_writable(&edges[0].node, choices.overlap_check, &left)?;
            journal = left.journal.map(|(journal, _)| journal);
            (header, l1, Some(all))
        }
        Purpose::Read | Purpose::Check => {
            replay::expect_none(&edges[0].node, &header, state_dir)?;
            (header, l1, None)
        }
    };
    edges.extend(open_backing(args, &edges[0].node, &header)?);
    let backing = (edges.len() - 1 > data).then_some(data + 1);
    let geometry = header.geometry();
    let cache =
        SliceCache::new(choices.l2).map_err(|_| err!("Could not allocate metadata caches"))?;
    let cluster = to_usize(geometry.cluster_size())?;
    let writing = match found {
        Some(found) => {
            Some(Writing::new(&edges[0].node, &header, &choices, found, args.graph, journal)?)
        }
        None => None,
    };
    let meter = NodeMeter::new(args.node_name, QCOW2.name);
    args.graph.meters().add_node(&meter);
    let image = Arc::new_cyclic(|me| Image {
        me: me.clone(),
        edges,
        data,
        backing,
        compressed: Decompressor::new(header.compression, cluster),
        corruption: Corruption::default(),
        flights: Flights::default(),
        geometry,
        size: header.size.into(),
        l1_offset: header.l1_table_offset.0.into(),
        header,
        choices,
        l1,
        cache,
        writing,
        meter,
    });
    image.count_journal();
    let tidy = Tidy::start(&image, args.graph.upkeep());
    Ok(Box::new(Qcow2(image, tidy)))
}

fn to_usize(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::from_errno("Image is too big", Errno(libc::EFBIG)))
}

/// The bytes of cluster 0, filled up with zeroes where the file ends earlier.
pub fn read_header(file: &Node) -> Result<Vec<u8>> {
    rt::block_on(Disk::new(file).read_cluster0())
        .map_err(|e| Error::from_errno("Could not read qcow2 header", e))
}

/// The active L1 table. One that is not wholly in the file is an error: QEMU would take the rest for unallocated.
pub fn read_l1(file: &Node, header: &Header) -> Result<L1Table> {
    let (offset, len) = (header.l1_table_offset.0, u64::from(header.l1_size) * 8);
    if file.len().saturating_sub(offset) < len {
        return Err(err!("Could not read L1 table: it lies beyond the end of the image file"));
    }
    let bytes = rt::block_on(Disk::new(file).read(offset, to_usize(len)?))
        .map_err(|e| Error::from_errno("Could not read L1 table", e))?;
    L1Table::parse(&bytes).map_err(|e| Error::from_errno("Could not read L1 table", e))
}

fn warn_of_stale_bitmaps(header: &Header) {
    if header.has_stale_bitmaps() {
        let text = if header.version < 3 {
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program \
             without persistent bitmap support; so now they must all be considered inconsistent"
        } else {
            "a program lacking bitmap support modified this file, so all bitmaps are now \
             considered inconsistent"
        };
        log::warn!("{text}");
    }
}

/// The external data file: as the user says, else as the header says. (A relative name there is relative to the working
/// directory, as in QEMU.)
fn open_data_file(args: &mut OpenArgs<'_>, header: &Header) -> Result<Option<Edge>> {
    let given = args.open_child_if_given("data-file", Role::Data)?;
    if !header.incompatible.contains(Incompatible::DATA_FILE) {
        return match given {
            Some(_) => {
                Err(err!("'data-file' can only be set for images with an external data file"))
            }
            None if header.autoclear.contains(Autoclear::DATA_FILE_RAW) => {
                Err(err!("data-file-raw requires a data file"))
            }
            None => Ok(None),
        };
    }
    match (given, header.data_file_name()) {
        (Some(edge), _) => Ok(Some(edge)),
        (None, Some(name)) => {
            let options = args.graph.implicit_file(&name)?;
            args.open_implicit_child("data-file", Role::Data, options).map(Some)
        }
        (None, None) => Err(err!("'data-file' is required for this image")),
    }
}

/// The backing file: as the user says, else as the header says.
fn open_backing(args: &mut OpenArgs<'_>, file: &Node, header: &Header) -> Result<Option<Edge>> {
    match args.options.get("backing") {
        Some(Value::Null) => {
            args.options.shift_remove("backing");
            return Ok(None);
        }
        Some(Value::String(name)) if name.is_empty() => {
            log::warn!("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
            args.options.shift_remove("backing");
            return Ok(None);
        }
        Some(_) => {
            let edge = args.open_child_if_given("backing", Role::Backing);
            return edge.map_err(|e| e.prepend("Could not open backing file: "));
        }
        None => {}
    }
    let Some(name) = header.backing_file_name() else { return Ok(None) };
    let format = header.backing_format();
    let options = args.graph.implicit_image(file, &name, format.as_deref());
    let edge =
        options.and_then(|options| args.open_implicit_child("backing", Role::Backing, options));
    edge.map(Some).map_err(|e| e.prepend("Could not open backing file: "))
}
