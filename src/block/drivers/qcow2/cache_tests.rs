use super::*;

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_be_bytes()).collect()
}

fn entry(word: u64) -> Option<L2Entry> {
    Some(L2Entry { word, bitmap: 0 })
}

#[cfg(not(loom))]
mod plain {
    use super::*;

    #[test]
    fn slices_come_and_go() {
        let shape = Shape { slices: 10, entries: 2, entry_words: 1, slots: 2 };
        let cache = SliceCache::new(shape).unwrap();
        assert_eq!(cache.get(3, 1), None);
        for slice in 0..10 {
            cache.fill(slice, &bytes(&[slice, slice + 100])).unwrap();
            assert_eq!(cache.get(slice, 1), entry(slice + 100));
        }
        assert_eq!((0..10).filter(|s| cache.get(*s, 0).is_some()).count(), 2);
        assert_eq!(cache.bytes_used(), 32);
    }

    /// What is dirty or being written is not evicted; a store during a write is not lost; nor is a failed write.
    #[test]
    fn dirty_slices_stay_until_they_are_written() {
        let shape = Shape { slices: 10, entries: 2, entry_words: 2, slots: 2 };
        let cache = SliceCache::new(shape).unwrap();
        let zero = bytes(&[0; 4]);
        let new = L2Entry { word: 7, bitmap: 8 };
        assert!(!cache.store(0, 1, &[new]));
        for slice in [1, 0] {
            cache.fill(slice, &zero).unwrap();
            assert!(cache.store(slice, 1, &[new]));
        }
        assert_eq!(cache.fill(2, &zero), Err(CacheFull));
        let copy = |slice, words: &[u64]| SliceCopy { slice, bytes: bytes(words) };
        let first = cache.snapshot();
        assert_eq!(first, [copy(0, &[0, 0, 7, 8]), copy(1, &[0, 0, 7, 8])]);
        assert_eq!((cache.has_dirty(), cache.dirty_count()), (false, 2));
        assert_eq!(cache.fill(2, &zero), Err(CacheFull));
        assert!(cache.store(1, 0, &[L2Entry { word: 5, bitmap: 6 }]));
        cache.written(&first, true);
        assert_eq!((cache.has_dirty(), cache.dirty_count()), (true, 1));
        cache.fill(2, &zero).unwrap();
        assert_eq!((cache.get(0, 1), cache.get(1, 1)), (None, Some(new)));
        let second = cache.snapshot();
        assert_eq!(second, [copy(1, &[5, 6, 7, 8])]);
        cache.written(&second, false);
        assert_eq!(cache.snapshot(), second);
        cache.written(&second, true);
        assert_eq!((cache.snapshot(), cache.dirty_count()), (vec![], 0));
    }

    #[test]
    fn runs_are_stored_as_one() {
        for entry_words in [1, 2] {
            let shape = Shape { slices: 2, entries: 4, entry_words, slots: 1 };
            let cache = SliceCache::new(shape).unwrap();
            cache.fill(1, &vec![0; 32 * entry_words as usize]).unwrap();
            let bitmap = if entry_words == 2 { 9 } else { 0 };
            let run = [1, 2].map(|word| L2Entry { word, bitmap });
            assert!(cache.store(1, 2, &run));
            let now: Vec<_> =
                (0..4).map(|index| cache.get_surely(1, index).unwrap().word).collect();
            assert_eq!(now, [0, 0, 1, 2]);
            assert_eq!(cache.get(1, 3), Some(run[1]));
        }
    }

    /// An empty run says that the slice must be written.
    #[test]
    fn an_empty_run_marks_dirty() {
        let shape = Shape { slices: 2, entries: 1, entry_words: 1, slots: 1 };
        let cache = SliceCache::new(shape).unwrap();
        cache.fill(1, &bytes(&[3])).unwrap();
        assert!(!cache.has_dirty() && cache.store(1, 0, &[]) && cache.has_dirty());
        assert_eq!(cache.snapshot(), [SliceCopy { slice: 1, bytes: bytes(&[3]) }]);
    }

    /// Slices beyond the disk, and beyond what the disk can ever be, are not there.
    #[test]
    fn nothing_is_beyond_the_shape() {
        let shape = Shape { slices: 2, entries: 1, entry_words: 1, slots: 1 };
        let cache = SliceCache::new(shape).unwrap();
        for slice in [2, u64::MAX] {
            assert_eq!(cache.get(slice, 0), None);
            assert_eq!(cache.get_surely(slice, 0), None);
            assert_eq!(cache.fill(slice, &[0; 8]), Err(CacheFull));
            assert!(!cache.store(slice, 0, &[L2Entry { word: 1, bitmap: 0 }]));
        }
    }

    /// Slices that nobody has asked for since the last time go; those in use and dirty ones stay.
    #[test]
    fn cleaning_gives_unused_slices_back() {
        for entries in [64, 512] {
            let shape = Shape { slices: 1000, entries, entry_words: 1, slots: 300 };
            let cache = SliceCache::new(shape).unwrap();
            let content = |slice: u64| bytes(&vec![slice + 1; entries as usize]);
            let slice_bytes = u64::from(entries) * 8;
            for slice in 0..300 {
                cache.fill(slice, &content(slice)).unwrap();
            }
            assert!(cache.store(7, 0, &[L2Entry { word: 70, bitmap: 0 }]));
            cache.clean();
            assert_eq!(cache.bytes_used(), 300 * slice_bytes);
            assert_eq!(cache.get(200, 5), entry(201));
            cache.clean();
            assert_eq!(cache.bytes_used(), 2 * slice_bytes);
            assert_eq!((cache.get(7, 0), cache.get(7, 1)), (entry(70), entry(8)));
            assert_eq!(cache.get(200, 63), entry(201));
            assert_eq!(cache.get(199, 5), None);
            for slice in 300..598 {
                cache.fill(slice, &content(slice)).unwrap();
            }
            assert!((300..598).all(|slice| cache.get(slice, 63) == entry(slice + 1)));
            assert_eq!((cache.get(7, 0), cache.get(200, 1)), (entry(70), entry(201)));
            assert_eq!(cache.bytes_used(), 300 * slice_bytes);
        }
    }

    /// The clock spares what is in use.
    #[test]
    fn what_is_used_survives() {
        let shape = Shape { slices: 100, entries: 1, entry_words: 1, slots: 8 };
        let cache = SliceCache::new(shape).unwrap();
        for slice in 0..100 {
            cache.fill(slice, &bytes(&[slice])).unwrap();
            assert_eq!(cache.get(0, 0), entry(0), "at {slice}");
        }
    }

    #[test]
    fn huge_disks_cost_nothing() {
        let shape = Shape { slices: 1 << 31, entries: 512, entry_words: 1, slots: 1 << 20 };
        let cache = SliceCache::new(shape).unwrap();
        cache.fill((1 << 31) - 1, &bytes(&[5; 512])).unwrap();
        assert_eq!(cache.get((1 << 31) - 1, 511), entry(5));
        assert_eq!(cache.bytes_used(), 4096);
    }

    #[test]
    fn readers_never_see_foreign_entries() {
        let shape = Shape { slices: 16, entries: 8, entry_words: 2, slots: 3 };
        let cache = SliceCache::new(shape).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut n = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let (slice, index) = (n >> 60, (n >> 32) as u32 % 8);
                        if let Some(e) = cache.get(slice, index) {
                            assert_eq!((e.word, e.bitmap), (slice, slice + 1));
                        }
                    }
                });
            }
            for n in 0..200_000u64 {
                let slice = (n * 7) % 16;
                if n % 1000 == 0 {
                    cache.clean();
                }
                cache.fill(slice, &bytes(&[slice, slice + 1].repeat(8))).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[cfg(loom)]
mod model {
    use loom::sync::Arc;

    use super::*;

    /// One slot, a reader, and a writer that evicts the reader's slice and brings it back.
    #[test]
    fn a_reader_sees_its_own_slice_or_nothing() {
        for entry_words in [1, 2] {
            loom::model(move || {
                let shape = Shape { slices: 2, entries: 1, entry_words, slots: 1 };
                let cache = Arc::new(SliceCache::new(shape).unwrap());
                let content = move |slice: u64| bytes(&vec![slice + 1; entry_words as usize]);
                cache.fill(0, &content(0)).unwrap();
                let writer = Arc::clone(&cache);
                let writer = loom::thread::spawn(move || {
                    writer.fill(1, &content(1)).unwrap();
                    writer.fill(0, &content(0)).unwrap();
                });
                if let Some(e) = cache.get(0, 0) {
                    let bitmap = if entry_words == 2 { 1 } else { 0 };
                    assert_eq!((e.word, e.bitmap), (1, bitmap));
                }
                writer.join().unwrap();
                assert_eq!(cache.get(0, 0).map(|e| e.word), entry(1).map(|e| e.word));
            });
        }
    }

    /// An entry of two words, both 1, that another thread makes 2.
    fn two_words_being_stored() -> (Arc<SliceCache>, loom::thread::JoinHandle<()>) {
        let shape = Shape { slices: 1, entries: 1, entry_words: 2, slots: 1 };
        let cache = Arc::new(SliceCache::new(shape).unwrap());
        cache.fill(0, &bytes(&[1, 1])).unwrap();
        let writer = Arc::clone(&cache);
        let writer = loom::thread::spawn(move || {
            assert!(writer.store(0, 0, &[L2Entry { word: 2, bitmap: 2 }]));
        });
        (cache, writer)
    }

    /// An entry of two words is replaced as one.
    #[test]
    fn no_torn_entries() {
        loom::model(|| {
            let (cache, writer) = two_words_being_stored();
            if let Some(e) = cache.get(0, 0) {
                assert_eq!(e.word, e.bitmap);
            }
            writer.join().unwrap();
        });
    }

    /// A run is stored while a snapshot is taken and written: the copy has all of the run or nothing, and what it does not
    /// have is still to be written.
    #[test]
    fn no_store_is_lost() {
        loom::model(|| {
            let shape = Shape { slices: 1, entries: 2, entry_words: 1, slots: 1 };
            let cache = Arc::new(SliceCache::new(shape).unwrap());
            cache.fill(0, &bytes(&[1, 1])).unwrap();
            assert!(cache.store(0, 0, &[]));
            let writer = Arc::clone(&cache);
            let writer = loom::thread::spawn(move || {
                assert!(writer.store(0, 0, &[L2Entry { word: 2, bitmap: 0 }; 2]));
            });
            let copies = cache.snapshot();
            assert_eq!(copies.len(), 1);
            let old = copies[0].bytes == bytes(&[1, 1]);
            assert!(old || copies[0].bytes == bytes(&[2, 2]));
            cache.written(&copies, true);
            writer.join().unwrap();
            assert_eq!(cache.has_dirty(), old);
            assert_eq!((cache.get(0, 0), cache.get(0, 1)), (entry(2), entry(2)));
        });
    }

    /// A slice is given back, and its slot filled with another, under a reader's eyes.
    #[test]
    fn a_reader_of_a_cleaned_slice_sees_it_or_nothing() {
        loom::model(|| {
            let shape = Shape { slices: 2, entries: 1, entry_words: 1, slots: 1 };
            let cache = Arc::new(SliceCache::new(shape).unwrap());
            cache.fill(0, &bytes(&[1])).unwrap();
            cache.clean();
            let cleaner = Arc::clone(&cache);
            let cleaner = loom::thread::spawn(move || {
                cleaner.clean();
                cleaner.fill(1, &bytes(&[2])).unwrap();
            });
            if let Some(e) = cache.get(0, 0) {
                assert_eq!(e.word, 1);
            }
            cleaner.join().unwrap();
            assert_eq!(cache.get(1, 0), entry(2));
        });
    }

    /// Who waits for stores does not miss a slice of two words that is being changed.
    #[test]
    fn a_store_is_no_miss_for_who_asks_surely() {
        loom::model(|| {
            let (cache, writer) = two_words_being_stored();
            let e = cache.get_surely(0, 0).expect("it is cached");
            assert_eq!(e.word, e.bitmap);
            writer.join().unwrap();
        });
    }
}
