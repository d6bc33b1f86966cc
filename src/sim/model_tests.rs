//! The model's rules on histories small enough to judge by hand.

use super::*;

fn sector(tag: Tag) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR_BYTES];
    fill(tag, 0, &mut bytes);
    bytes
}

fn model() -> Model {
    Model::new(Box::new(|_| Tag::before(1)), 0)
}

/// A write at `issued`, ended at `ended`.
fn write(model: &mut Model, issued: Time, ended: Time) -> Tag {
    let (number, tag) = model.begin(Change::Write, 0..1, false, issued);
    model.end(number, true, ended);
    tag
}

fn flush(model: &mut Model, issued: Time, ended: Time, ok: bool) {
    let number = model.begin_flush(issued);
    model.end_flush(number, ok, ended);
}

#[track_caller]
fn after(model: &Model, crash: Crash, at: Time, tags: &[Tag], legal: &[bool]) {
    for (tag, legal) in tags.iter().zip(legal) {
        let found = model.after(crash, at).check(0, &sector(*tag));
        assert_eq!(found.is_ok(), *legal, "{tag} after {crash:?} at {at}");
    }
}

#[test]
fn a_flush_promises_what_was_complete_when_it_was_issued() {
    let mut m = model();
    let a = write(&mut m, 1, 2);
    let b = write(&mut m, 3, 6);
    flush(&mut m, 5, 8, true);
    let c = write(&mut m, 9, 10);
    let tags = [Tag::before(1), a, b, c];
    after(&m, Crash::Power, 7, &tags, &[true, true, true, false]);
    after(&m, Crash::Power, 20, &tags, &[false, true, true, true]);
    after(&m, Crash::Kill, 4, &tags, &[false, true, true, false]);
    after(&m, Crash::Kill, 20, &tags, &[false, false, false, true]);
}

#[test]
fn overlapping_writes_may_end_in_either_order() {
    let mut m = model();
    let a = write(&mut m, 1, 10);
    let b = write(&mut m, 2, 5);
    flush(&mut m, 11, 12, true);
    after(&m, Crash::Power, 20, &[Tag::before(1), a, b], &[false, true, true]);
    let read = |tag, issued, ended| m.check_read(0, &sector(tag), issued, ended).is_ok();
    assert!(read(Tag::before(1), 3, 4) && read(a, 3, 4) && read(b, 3, 4));
    assert!(!read(Tag::before(1), 6, 7) && read(a, 6, 7) && read(b, 6, 7));
}

#[test]
fn failures_and_discards_leave_both() {
    let mut m = model();
    let a = write(&mut m, 1, 2);
    let (failed, b) = m.begin(Change::Write, 0..1, false, 3);
    m.end(failed, false, 4);
    let (discard, _) = m.begin(Change::Discard, 0..1, false, 5);
    m.end(discard, true, 6);
    let tags = [Tag::before(1), a, b, Tag::ZERO];
    after(&m, Crash::Kill, 20, &tags, &[false, true, true, true]);
    let c = write(&mut m, 7, 8);
    after(&m, Crash::Kill, 20, &[a, b, Tag::ZERO, c], &[false, false, false, true]);
}

#[test]
fn a_failed_flush_promises_nothing_afterwards_either() {
    let mut m = model();
    let a = write(&mut m, 1, 2);
    flush(&mut m, 3, 4, false);
    flush(&mut m, 5, 6, true);
    after(&m, Crash::Power, 20, &[Tag::before(1), a], &[true, true]);
    let b = write(&mut m, 7, 8);
    flush(&mut m, 9, 10, true);
    after(&m, Crash::Power, 20, &[Tag::before(1), a, b], &[false, false, true]);
}

#[test]
fn force_unit_access_needs_no_flush() {
    let mut m = model();
    let (number, tag) = m.begin(Change::Write, 0..1, true, 1);
    m.end(number, true, 2);
    after(&m, Crash::Power, 3, &[Tag::before(1), tag], &[false, true]);
}

#[test]
fn mixtures_are_seen() {
    let mut bytes = sector(Tag(3));
    assert_eq!(tag_of(0, &bytes), Ok(Tag(3)));
    assert!(tag_of(1, &bytes).is_err());
    bytes[300..].copy_from_slice(&sector(Tag(4))[300..]);
    assert!(tag_of(0, &bytes).unwrap_err().starts_with("a mixture"));
    let mut zeroes = sector(Tag::ZERO);
    assert_eq!(tag_of(9, &zeroes), Ok(Tag::ZERO));
    zeroes[511] = 1;
    assert!(tag_of(9, &zeroes).is_err());
}
