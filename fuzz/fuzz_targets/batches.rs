//! Whatever offsets, lengths, ids and flags: no panic, no memory touched beyond the slices (AddressSanitizer), every kept
//! token once in a batch and none besides, and results that do not depend on threads.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

use prefkern_core::batches::balance;
use prefkern_core::batches::collate::{Batch, Keep, Layout, Options, Sequences, Slots};
use prefkern_core::batches::ids::Ids;
use prefkern_core::batches::padding_free::{self, Flat, Mask, Tokens};
use prefkern_core::batches::place_rows::place_rows;
use prefkern_core::batches::token_batches::{self, Cost};
use prefkern_core::rows::Rows;

#[derive(Arbitrary, Debug)]
struct Case {
    /// Taken as they are, they are mostly refused.
    wild: [Vec<i64>; 2],
    /// Lengths of the cells of every row, of prompts and one or two completion columns.
    rows: Vec<[u8; 3]>,
    ids: Vec<i32>,
    two: bool,
    narrow: bool,
    flags: [bool; 4],
    max_length: Option<u8>,
    threads: u8,
    numbers: Vec<i64>,
    parts: u8,
    seed: u64,
}

fuzz_target!(|case: Case| {
    collated(&case);
    shared_out(&case);
});

fn options(case: &Case) -> Options {
    Options {
        max_length: case.max_length.map(usize::from),
        keep: if case.flags[0] {
            Keep::Start
        } else {
            Keep::End
        },
        layout: if case.flags[1] {
            Layout::Concatenated
        } else {
            Layout::Interleaved
        },
        shifted: case.flags[2],
    }
}

fn collated(case: &Case) {
    let names: Vec<String> = ["prompt_ids", "chosen_ids", "rejected_ids"]
        [..2 + usize::from(case.two)]
        .iter()
        .map(|&name| name.to_owned())
        .collect();
    let wild = case.wild.iter().map(|column| &column[..]).collect();
    if let Ok(sequences) = Sequences::new(&names[..2], wild, options(case)) {
        let few = [Ids::I32(&case.ids), Ids::I32(&case.ids)];
        let mut lengths = vec![0; sequences.count()];
        let _ = sequences.lengths(&mut lengths);
        let rows = Rows::Padded {
            rows: lengths.len(),
            width: 4,
        };
        let mut ids = vec![0; rows.total()];
        let mut mask = ids.clone();
        let batch = Batch {
            input_ids: &mut ids,
            completion_mask: &mut mask,
            attention_mask: None,
            position_ids: None,
        };
        if !lengths.is_empty() {
            let _ = sequences.fill(&few, Slots { rows, pivot: None }, 0, batch, 1);
        }
    }
    let columns: Vec<Vec<i64>> = (0..names.len())
        .map(|column| {
            let mut offsets = vec![0];
            for row in case.rows.iter().take(48) {
                offsets.push(offsets[offsets.len() - 1] + i64::from(row[column] % 40));
            }
            offsets
        })
        .collect();
    let most = columns
        .iter()
        .map(|offsets| offsets[offsets.len() - 1])
        .max();
    let mut wide: Vec<i64> = case.ids.iter().map(|&id| i64::from(id)).collect();
    wide.resize(most.unwrap_or(0) as usize, 7);
    let narrow: Vec<i32> = wide.iter().map(|&id| id as i32).collect();
    let ids: Vec<Ids> = names
        .iter()
        .map(|_| {
            if case.narrow {
                Ids::I32(&narrow)
            } else {
                Ids::I64(&wide)
            }
        })
        .collect();
    let sequences = Sequences::new(
        &names,
        columns.iter().map(|offsets| &offsets[..]).collect(),
        options(case),
    )
    .expect("valid");
    let mut lengths = vec![0; sequences.count()];
    if sequences.lengths(&mut lengths).is_err() || lengths.is_empty() {
        return;
    }
    let width = lengths.iter().max().map_or(0, |&most| most as usize);
    let rows = Rows::Padded {
        rows: lengths.len(),
        width,
    };
    let fill = |threads: usize| {
        let mut out = [(); 4].map(|()| vec![-9; rows.total()]);
        let [input_ids, completion_mask, attention_mask, position_ids] = &mut out;
        let batch = Batch {
            input_ids,
            completion_mask,
            attention_mask: Some(attention_mask),
            position_ids: Some(position_ids),
        };
        let done = sequences.fill(&ids, Slots { rows, pivot: None }, -1, batch, threads);
        done.map(|()| out)
    };
    let found = fill(1);
    assert_eq!(found, fill(usize::from(case.threads % 4)));
    let Ok([input_ids, completion_mask, attention_mask, position_ids]) = found else {
        assert!(wide.iter().any(|&id| id < 0));
        return;
    };
    for (row, &length) in lengths.iter().enumerate() {
        for column in 0..width {
            let cell = row * width + column;
            let kept = column < length as usize;
            assert_eq!(attention_mask[cell], i64::from(kept));
            assert_eq!(input_ids[cell] >= 0, kept);
            assert!(completion_mask[cell] <= attention_mask[cell]);
            assert_eq!(position_ids[cell], if kept { column as i64 } else { 0 });
        }
    }
    flattened(&input_ids, &attention_mask, width, &lengths, case);
}

fn flattened(ids: &[i64], mask: &[i64], width: usize, lengths: &[i64], case: &Case) {
    let mut counts = vec![0; lengths.len()];
    if width > 0 {
        padding_free::count(Mask::I64(mask), width, &mut counts).expect("flags");
        assert_eq!(counts, lengths);
    }
    let mut bounds = vec![0];
    for &length in lengths {
        bounds.push(bounds[bounds.len() - 1] + length);
    }
    let total = bounds[bounds.len() - 1] as usize;
    let mut out = [(); 3].map(|()| vec![-9; total]);
    let [found, positions, indices] = &mut out;
    let into = Flat {
        ids: found,
        positions,
        indices,
    };
    let tokens = Tokens::Padded(Ids::I64(ids), Mask::I64(mask));
    let negative =
        padding_free::flatten(tokens, width, &bounds, into, usize::from(case.threads % 4));
    assert_eq!(negative, Ok(false));
    let kept = (0..ids.len()).filter(|&cell| mask[cell] == 1);
    for (at, cell) in kept.enumerate() {
        assert_eq!((out[0][at], out[2][at]), (ids[cell], cell as i64));
    }
}

fn shared_out(case: &Case) {
    let budget = 1 << 20;
    let lengths: Vec<i64> = case
        .numbers
        .iter()
        .map(|n| n.rem_euclid(budget + 1))
        .collect();
    let parts = usize::from(case.parts % 9) + 1;
    if lengths.len() >= parts {
        let equal = case.flags[0] && lengths.len().is_multiple_of(parts);
        let mut part_of = vec![-1; lengths.len()];
        balance::balance(&lengths, parts, equal, &mut part_of, &|| false).expect("memory");
        let mut counts = vec![0; parts];
        part_of.iter().for_each(|&part| counts[part as usize] += 1);
        assert!(!equal || counts.iter().all(|&count| count == lengths.len() / parts));
    }
    let cost = if case.flags[1] {
        Cost::Tokens
    } else {
        Cost::Padded
    };
    let mut order = vec![-1; lengths.len()];
    let given = (case.seed, case.seed >> 7);
    if let Ok(bounds) =
        token_batches::token_batches(&lengths, (budget, cost), parts, given, &mut order, &|| {
            false
        })
    {
        assert_eq!((bounds.len() - 1) % parts, 0);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(at, &row)| row == at as i64));
    }
    let _ = place_rows(
        &case.ids,
        &case.wild[0],
        &case.wild[1],
        (9, 0),
        &mut [0; 36],
        1,
    );
}
