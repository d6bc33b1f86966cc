//! What fuzzing has found, each by itself.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;
use vhost_user_blk::block::drivers::qcow2::check::Fix;

use super::fuzz::bed::Bed;
use super::fuzz::entropy::Entropy;
use super::fuzz::guest::{self, Model, Step};
use super::fuzz::image::{self, Kind, Made, Shape};
use super::fuzz::{assert_tables_are_tables, contents};

/// All clusters are allocated, none of them compressed.
fn full(shape: Shape) -> Made {
    image::make(shape, &mut Entropy(&[1; 4000]))
}

fn work(
    bed: &Bed,
    more: serde_json::Value,
    batches: &[Vec<Step>],
    model: Model,
) -> Rc<RefCell<Model>> {
    let opened = bed.open(true, more).unwrap();
    let node = opened.node();
    let model = Rc::new(RefCell::new(model));
    bed.run(guest::work(&node, batches, &model));
    drop(node);
    opened.close();
    model
}

fn blind(len: u64) -> Model {
    let mut model = Model::new(len);
    model.blind = true;
    model
}

#[test]
fn a_bitmap_of_any_granularity_is_judged() {
    let mut m = full(Shape { bitmap: true, ..Shape::PLAIN });
    let granularity =
        m.of(Kind::Other).into_iter().find(|f| f.width == 1 && m.get(*f) == 16).unwrap();
    m.put(granularity.at, 1, 200);
    let bed = Bed::new(1, &m, None);
    let error = bed.open(false, json!({})).err().unwrap().to_string();
    assert!(error.contains("doesn't satisfy the constraints"), "{error}");
    assert!(bed.check(Fix::Nothing).is_err());
}

#[test]
fn a_discard_in_a_data_file_leaves_the_image_file_alone() {
    let shape = Shape { data_file: true, ..Shape::PLAIN };
    let m = full(shape);
    let bed = Bed::new(1, &m, None);
    let steps = [vec![Step::Discard(0..shape.size / 2)], vec![Step::Flush]];
    let model = work(&bed, json!({ "discard-no-unref": true }), &steps, contents(&m));
    let (report, told) = bed.check(Fix::Nothing).unwrap();
    assert!(report.is_clean(), "{report:?} {told:?}");
    let again = bed.open(false, json!({})).unwrap();
    bed.run(guest::read_all(&again.node(), &model, "opened again"));
    again.close();
}

#[test]
fn a_repair_tells_of_entries_that_lead_to_its_new_tables() {
    let mut m = full(Shape::PLAIN);
    // Beyond the end of the file; refcounts that must be built anew.
    let (entry, refcounts) = (m.of(Kind::L2)[0], m.of(Kind::Refblock)[0]);
    m.put(entry.at, 8, 1 << 63 | m.file.len() as u64);
    m.put(refcounts.at, 8, 0);
    let bed = Bed::new(1, &m, None);
    let (report, told) = bed.check(Fix::All).unwrap();
    let (again, _) = bed.check(Fix::Nothing).unwrap();
    assert_eq!(report.corruptions, again.corruptions, "{told:?}");
    assert!(again.corruptions > 0, "the premise: {told:?}");
}

/// A data entry leads to `to`: after a discard of it the guest writes as much as it can.
fn discarded_table(to: u64) {
    let mut m = full(Shape::PLAIN);
    let entry = m.of(Kind::L2)[0];
    m.put(entry.at, 8, 1 << 63 | to);
    let bed = Bed::new(1, &m, None);
    let (first, all) = (Step::Discard(0..512), 0..Shape::PLAIN.size);
    let steps = [
        vec![first],
        vec![Step::Flush],
        vec![Step::Zeroes(all.clone(), true)],
        vec![Step::Write(all, false)],
    ];
    work(&bed, json!({}), &steps, blind(Shape::PLAIN.size));
    assert_tables_are_tables(&bed.sim.image("image"));
}

#[test]
fn an_entry_for_data_says_nothing_of_tables() {
    let m = full(Shape::PLAIN);
    let l1 = m.get(m.of(Kind::Header).into_iter().find(|f| f.at == 40).unwrap());
    let l2 = m.get(m.of(Kind::L1)[1]) & !(1 << 63);
    discarded_table(l1);
    discarded_table(l2);
}

/// Two L1 entries with one table that is said to be shared, but has a refcount of 1.
#[test]
fn a_table_that_another_entry_leads_to_stays_a_table() {
    let mut m = full(Shape::PLAIN);
    let l1 = m.of(Kind::L1);
    let table = m.get(l1[0]) & !(1 << 63);
    m.put(l1[0].at, 8, table);
    m.put(l1[1].at, 8, table);
    let bed = Bed::new(1, &m, None);
    let part = 32 << 10;
    let steps = [
        // The first entry gets a table of its own.
        vec![Step::Zeroes(0..512, true)],
        vec![Step::Flush],
        vec![Step::Flush],
        vec![Step::Zeroes(0..part, true)],
        vec![Step::Write(0..part, false)],
    ];
    work(&bed, json!({}), &steps, blind(Shape::PLAIN.size));
    assert_tables_are_tables(&bed.sim.image("image"));
}
