use super::*;

const OF: Identity = Identity { id: (7, 9), born: 0, cluster_bits: 16, boot: [1, 2], state: 5 };

fn record(n: u64) -> Record {
    Record { place: n * 8, old: n, new: n + 1 }
}

fn opened(dir: &Path, of: &Identity) -> (Journal, Result<Option<Left>, String>) {
    Journal::open(dir, of).unwrap()
}

fn left(dir: &Path, of: &Identity) -> Result<Option<Left>, String> {
    opened(dir, of).1
}

#[test]
fn what_was_not_forgotten_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, nothing) = opened(dir.path(), &OF);
    assert_eq!(nothing, Ok(None));
    journal.start(&OF);
    // Around the ring's end, more than once.
    for round in 0..5 {
        append(&journal, RECORDS / 2, 0);
        let mark = journal.mark();
        append(&journal, 3, round);
        journal.forget(mark);
        assert_eq!(journal.len(), 3);
        journal.forget(if round < 4 { journal.mark() } else { mark });
    }
    assert!(Journal::open(dir.path(), &OF).is_err(), "somebody has it");
    drop(journal);
    let found = left(dir.path(), &OF).unwrap().unwrap();
    assert_eq!(found.records, [4, 5, 6].map(record));
    assert!(!found.applied && found.beat + 60 > now());
    assert_eq!(left(dir.path(), &Identity { boot: [1, 3], ..OF }), Ok(None), "another boot");
    assert_eq!(left(dir.path(), &Identity { born: 3, ..OF }), Ok(None), "another file");
    assert!(left(dir.path(), &Identity { cluster_bits: 12, ..OF }).is_err());
    assert!(left(dir.path(), &Identity { state: 0, ..OF }).is_err(), "somebody else wrote");
    assert!(is_waiting(dir.path(), &OF) && !is_waiting(dir.path(), &Identity { id: (1, 1), ..OF }));
    let _held = opened(dir.path(), &OF);
    assert!(!is_waiting(dir.path(), &OF), "somebody has it");
}

/// How much of the machine's memory (or disk) the file takes, in bytes.
fn taken(journal: &Journal) -> u64 {
    journal.file.metadata().unwrap().blocks() * 512
}

fn append(journal: &Journal, count: u64, first: u64) {
    assert!(journal.has_room(count));
    journal.append((first..first + count).map(record));
}

#[test]
fn it_grows_with_what_is_in_it_and_begins_anew_when_that_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = opened(dir.path(), &OF);
    journal.start(&OF);
    let small = bytes_for(FLOOR) + 4096;
    for round in 0..4 * RECORDS / FLOOR {
        append(&journal, FLOOR - 1, round);
        journal.forget(journal.mark());
        assert!(taken(&journal) <= small, "round {round}: {}", taken(&journal));
    }
    // As much as there may be; with a beginning that is not the file's.
    append(&journal, 2, 0);
    journal.forget(journal.mark() - 1);
    (0..RECORDS / FLOOR - 1).for_each(|n| append(&journal, FLOOR, n * FLOOR));
    append(&journal, FLOOR - 1, RECORDS - FLOOR);
    assert!(!journal.has_room(1) && journal.len() == RECORDS);
    assert!(taken(&journal) >= bytes_for(RECORDS));
    let mark = journal.mark();
    journal.forget(mark - 3);
    append(&journal, 5, RECORDS);
    drop(journal);
    let found = left(dir.path(), &OF).unwrap().unwrap().records;
    let want = (RECORDS - 4..RECORDS - 1).chain(RECORDS..RECORDS + 5);
    assert_eq!(found, want.map(record).collect::<Vec<_>>());
}

#[test]
#[should_panic(expected = "looked for room")]
fn nothing_is_stored_where_nothing_is_allocated() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = opened(dir.path(), &OF);
    journal.start(&OF);
    journal.append((0..=FLOOR).map(record));
}

#[test]
fn records_count_from_the_store_of_the_tail_on() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = opened(dir.path(), &OF);
    journal.start(&OF);
    // The process dies in the middle of an append.
    let dying = std::panic::AssertUnwindSafe(|| {
        journal.append((0..5).map(|n| if n < 3 { record(n) } else { panic!("dies") }));
    });
    assert!(std::panic::catch_unwind(dying).is_err());
    drop(journal);
    assert_eq!(left(dir.path(), &OF), Ok(None));
}

/// With the mistake of [`Mutation::TailFirst`] the one before fails.
#[test]
fn a_tail_before_its_record_is_noticed() {
    crate::block::drivers::qcow2::write::mutation::set(Some(Mutation::TailFirst));
    let found = std::panic::catch_unwind(records_count_from_the_store_of_the_tail_on);
    crate::block::drivers::qcow2::write::mutation::set(None);
    assert!(found.is_err());
}

#[test]
fn a_journal_that_lies_is_refused() {
    let mut words = vec![0; WORDS];
    let good = [MAGIC, 1, 2, 7, 9, 16, 0, 0, 4, 6, 0, 5];
    words[..12].copy_from_slice(&good);
    assert_eq!(parse(&words, &OF).unwrap().unwrap().records.len(), 2);
    for (at, value) in [
        (0, 5),
        (DEV, 1),
        (INO, 1),
        (HEAD, 7),
        (STATE, 0),
        (STATE, 6),
        (TAIL, 5 + RECORDS),
        (TAIL, u64::MAX),
    ] {
        words[..12].copy_from_slice(&good);
        words[at] = value;
        assert!(parse(&words, &OF).is_err(), "{at}: {value}");
    }
}

#[test]
fn an_empty_one_goes_and_links_are_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = opened(dir.path(), &OF);
    let path = journal.path.clone();
    journal.start(&OF);
    journal.append([record(1)].into_iter());
    journal.remove();
    assert!(path.exists());
    journal.forget(journal.mark());
    journal.remove();
    assert!(!path.exists());
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    assert!(Journal::open(dir.path(), &OF).is_err());
}
