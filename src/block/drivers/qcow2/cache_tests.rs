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

    #[test]
    fn dirty_slices_stay() {
        let shape = Shape { slices: 10, entries: 2, entry_words: 2, slots: 2 };
        let cache = SliceCache::new(shape).unwrap();
        let zero = bytes(&[0; 4]);
        let new = L2Entry { word: 7, bitmap: 8 };
        assert!(!cache.store(0, 1, new));
        for slice in [0, 1] {
            cache.fill(slice, &zero).unwrap();
            assert!(cache.store(slice, 1, new));
        }
        assert_eq!(cache.fill(2, &zero), Err(CacheFull));
        assert_eq!(cache.dirty(), [0, 1]);
        assert_eq!(cache.take_dirty(0).unwrap(), bytes(&[0, 0, 7, 8]));
        cache.fill(2, &zero).unwrap();
        assert_eq!((cache.get(0, 1), cache.get(1, 1)), (None, Some(new)));
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

    /// An entry of two words is replaced as one.
    #[test]
    fn no_torn_entries() {
        loom::model(|| {
            let shape = Shape { slices: 1, entries: 1, entry_words: 2, slots: 1 };
            let cache = Arc::new(SliceCache::new(shape).unwrap());
            cache.fill(0, &bytes(&[1, 1])).unwrap();
            let writer = Arc::clone(&cache);
            let writer = loom::thread::spawn(move || {
                assert!(writer.store(0, 0, L2Entry { word: 2, bitmap: 2 }));
            });
            if let Some(e) = cache.get(0, 0) {
                assert_eq!(e.word, e.bitmap);
            }
            writer.join().unwrap();
        });
    }
}
