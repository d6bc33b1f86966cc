//! What is done with the images.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::qcow2::check::Fix;
use vhost_user_blk::block::print::{self, Format};
use vhost_user_blk::error::Errno;
use vhost_user_blk::sim::{Fault, Pages, Request};

use super::bed::{Bed, image_of};
use super::entropy::Entropy;
use super::guest::{self, MARK, Model};
use super::image::{self, Made, Shape};
use super::mutate::{Change, mutate};

/// What a run begins with.
struct Case<'a> {
    e: Entropy<'a>,
    made: Made,
    /// The changes: what, where, from and to.
    changed: Vec<Change>,
    seed: u64,
    options: Value,
}

impl Case<'_> {
    fn new(bytes: &[u8]) -> Case<'_> {
        let mut e = Entropy(bytes);
        let seed = u64::from(e.byte());
        let shape = Shape::random(&mut e);
        let options = options(&mut e, shape.version);
        let mut made = image::make(shape, &mut e);
        let changed = mutate(&mut made, &mut e);
        Case { e, made, changed, seed, options }
    }

    /// Whether nothing was changed.
    fn is_sound(&self) -> bool {
        self.changed.is_empty()
    }

    /// With `VUB_FUZZ_VERBOSE`: what this is about.
    fn tell(&self, more: impl FnOnce() -> String) {
        if std::env::var_os("VUB_FUZZ_VERBOSE").is_some() {
            eprintln!("{:?}, {}, changed {:x?}", self.made.shape, self.options, self.changed);
            eprintln!("{}", more());
        }
    }
}

/// What the guest must see of an image that nothing was changed in.
pub fn contents(made: &Made) -> Model {
    let mut model = Model::new(made.shape.size);
    model.bytes.copy_from_slice(&made.content);
    model.known.fill(true);
    model.sound = true;
    model
}

fn options(e: &mut Entropy, version: u32) -> Value {
    let mut options = json!({});
    if e.one_in(3) {
        options["l2-cache-size"] = json!(1024);
        options["l2-cache-entry-size"] = json!(512);
    }
    if e.one_in(8) {
        options["overlap-check"] = json!("all");
    }
    if version > 2 && e.one_in(8) {
        options["discard-no-unref"] = json!(true);
    }
    if e.one_in(4) {
        options["pass-discard-other"] = json!(true);
    }
    options
}

/// Opens to read and to write, prints, checks, repairs.
pub fn open(bytes: &[u8]) {
    let case = Case::new(bytes);
    let bed = Bed::new(case.seed, &case.made, None);
    let opened = bed.open(false, case.options.clone());
    case.tell(String::new);
    assert!(opened.is_ok() || !case.is_sound(), "a sound image: {}", opened.err().unwrap());
    if let Ok(opened) = opened {
        for format in [Format::Text, Format::Json, Format::Dot] {
            assert!(!print::print(&opened.graph, format).is_empty());
        }
        assert!(opened.close());
    }
    let before = bed.check(Fix::Nothing);
    if case.is_sound() {
        let (report, told) = before.as_ref().expect("a sound image");
        assert!(report.is_clean(), "a sound image: {report:?} {told:?}");
    }
    assert!(bed.sim.image("image") == image_of(&case.made), "reading has changed the image");
    let counts = bed.sim.counts("image");
    assert_eq!((counts[1], counts[2], counts[3], counts[5]), (0, 0, 0, 0), "changes by reading");
    if let Ok(opened) = bed.open(true, case.options.clone()) {
        assert!(!print::print(&opened.graph, Format::Text).is_empty());
        opened.close();
    }
    let repaired = bed.check(Fix::All);
    case.tell(|| format!("{repaired:?}"));
    if let Ok((report, _)) = repaired
        && report.corruptions == 0
        && report.check_errors == 0
    {
        let (after, told) = bed.check(Fix::Nothing).expect("a repaired image");
        // An image whose refcounts were built anew is without leaks only in theory: theirs may be found by the next.
        assert!(after.corruptions == 0 && after.check_errors == 0, "repaired: {after:?} {told:?}");
    }
    bed.assert_bounded();
}

/// Reads all of it, twice.
pub fn read(bytes: &[u8]) {
    let case = Case::new(bytes);
    let bed = Bed::new(case.seed, &case.made, None);
    let opened = match bed.open(false, case.options.clone()) {
        Ok(opened) => opened,
        Err(e) => {
            assert!(!case.is_sound(), "a sound image: {e}");
            return;
        }
    };
    let node = opened.node();
    let model = if !case.is_sound() { Model::new(node.len()) } else { contents(&case.made) };
    let model = RefCell::new(model);
    bed.run(guest::read_all(&node, &model, "reading"));
    bed.run(guest::read_all(&node, &model, "reading again"));
    drop(node);
    assert!(opened.close());
    assert!(bed.sim.image("image") == image_of(&case.made), "reading has changed the image");
    bed.assert_bounded();
}

/// A guest at work.
pub fn write(bytes: &[u8]) {
    let mut case = Case::new(bytes);
    let full = case.e.one_in(12);
    let capacity = case.made.file.len() as u64 + case.e.below(20) * 1024;
    let capacity = full.then_some(capacity);
    let bed = Bed::new(case.seed, &case.made, capacity);
    let clean = bed.check(Fix::Nothing).is_ok_and(|(report, _)| report.is_clean());
    assert!(clean || !case.is_sound(), "a sound image");
    let entangled = are_entangled(&bed.sim.image("image"));
    let opened = match bed.open(true, case.options.clone()) {
        Ok(opened) => opened,
        Err(e) => {
            assert!(!case.is_sound(), "a sound image: {e}");
            return;
        }
    };
    let node = opened.node();
    let mut model = if !case.is_sound() { Model::new(node.len()) } else { contents(&case.made) };
    model.sound &= !full;
    // Clusters may be shared by mistake: nobody can say what they hold.
    model.blind = !clean;
    let model = Rc::new(RefCell::new(model));
    if clean && !case.is_sound() {
        // Who knows what the disk is now; from now on it must be that.
        bed.run(guest::read_all(&node, &model, "at first"));
    }
    let cluster = 1 << case.made.shape.cluster_bits;
    let fault = case.e.one_in(8).then(|| fault(&mut case.e));
    if let Some(fault) = fault {
        model.borrow_mut().sound = false;
        let done = bed.sim.counts("image")[fault.request as usize];
        bed.sim.fail("image", Fault { nth: done + fault.nth, ..fault });
    }
    let batches = guest::steps(&mut case.e, node.len(), cluster);
    case.tell(|| format!("clean {clean}, {capacity:?}, {fault:?}, {batches:?}"));
    bed.run(guest::work(&node, &batches, &model));
    bed.run(guest::read_all(&node, &model, "afterwards"));
    drop(node);
    let closed = opened.close();
    assert!(closed || !model.borrow().sound, "closing a sound image");
    bed.assert_bounded();
    if !entangled {
        assert_tables_are_tables(&bed.sim.image("image"));
    }
    if clean {
        bed.sim.forgive();
        let leaks = full || fault.is_some() || case.made.shape.bitmap || !case.is_sound();
        judge(&bed, leaks, closed.then_some(&model));
    }
}

/// One of the next requests to the image file fails.
fn fault(e: &mut Entropy) -> Fault {
    let kinds =
        [Request::Read, Request::Write, Request::WriteZeroes, Request::Discard, Request::Flush];
    Fault {
        request: e.pick(&kinds),
        nth: e.below(24),
        times: 1 + e.below(3),
        errno: e.pick(&[Errno::EIO, Errno::ENOSPC]),
        partial: e.one_in(2),
    }
}

/// An image without errors has none now, and its content is the guest's, if it could be closed. `leaks`: there may be some.
/// (Bitmaps that are not kept up to date any more are lost, for one.)
fn judge(bed: &Bed, leaks: bool, model: Option<&Rc<RefCell<Model>>>) {
    let (report, told) = bed.check(Fix::Nothing).expect("an image that was clean");
    assert!(report.corruptions == 0 && report.check_errors == 0, "{report:?} {told:?}");
    assert!(report.leaks == 0 || leaks, "{report:?} {told:?}");
    let again = bed.open(false, json!({})).expect("an image that was clean");
    if let Some(model) = model {
        bed.run(guest::read_all(&again.node(), model, "opened again"));
    }
    assert!(again.close());
}

/// The header, the L1 table, L2 tables, the refcount table and refcount blocks: what, where, how long, in order.
fn tables(image: &Pages) -> Vec<(u64, u64, &'static str)> {
    let header = read_table(image, 0, 64);
    let (cluster_bits, l1_size) = (header[2] as u32, u64::from(header[4] as u32));
    let (l1, reftable, clusters) = (header[5], header[6], header[7] >> 32);
    let cluster = 1u64 << cluster_bits.clamp(9, 21);
    let l1_len = l1_size * 8;
    let mut tables = vec![
        (0, cluster, "header"),
        (l1, l1_len, "L1 table"),
        (reftable, clusters * cluster, "refcount table"),
    ];
    let entries =
        read_table(image, l1, l1_len).into_iter().map(|word| word & 0x00ff_ffff_ffff_fe00);
    tables.extend(entries.filter(|at| *at != 0).map(|at| (at, cluster, "L2 table")));
    let entries =
        read_table(image, reftable, clusters * cluster).into_iter().map(|word| word & !0x1ff);
    tables.extend(entries.filter(|at| *at != 0).map(|at| (at, cluster, "refcount block")));
    tables.sort_unstable();
    tables.dedup();
    tables
}

/// Whether tables lie in each other: then writing one may make another lead anywhere.
fn are_entangled(image: &Pages) -> bool {
    tables(image).windows(2).any(|pair| pair[0].0.saturating_add(pair[0].1) > pair[1].0)
}

/// # Panics
/// If data of the guest is in a table.
pub fn assert_tables_are_tables(image: &Pages) {
    let mark = u64::from_be_bytes([&MARK[..], &[0; 2]].concat().try_into().expect("8 bytes"));
    for (offset, len, name) in tables(image) {
        let mut words = read_table(image, offset, len).into_iter();
        let found = words.position(|word| word & !0xffff == mark);
        assert_eq!(found, None, "data of the guest in the {name} at {offset:#x}");
    }
}

/// The words at `offset`, as far as the image has them; none of a table that is longer than any can be.
fn read_table(image: &Pages, offset: u64, len: u64) -> Vec<u64> {
    let len = len.min(image.len().saturating_sub(offset));
    let mut bytes = vec![0; if len > 32 << 20 { 0 } else { len as usize }];
    image.read(offset, &mut bytes);
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}
