//! In which order contestants take their turns.
//!
//! A turn may find the machine as the one before it has left it: how much memory is free and how it is cut up, what the disk's own cache has. With one order that only begins elsewhere
//! each time, everyone would follow the same neighbour again and again. So rounds go through orders in which everyone follows everyone else equally often (Williams's design), each of
//! them forwards and then backwards.

/// Who comes when in a round, of so many: each number below `count` once. Over `2 * count` rounds everyone has every place equally often, and comes directly behind everyone else equally
/// often; over `count` rounds everyone comes first once.
pub fn order(count: usize, round: usize) -> Vec<usize> {
    let shift = round / 2;
    // 0, 1, -1, 2, -2, ...: no step from one to the next is as long as another.
    let zigzag = (0..count).map(|place| if place % 2 == 1 { place.div_ceil(2) } else { count - place / 2 });
    let mut order: Vec<_> = zigzag.map(|index| (index + shift) % count).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn everyone_has_every_place_and_follows_everyone_else_equally_often() {
        for count in 1..8 {
            let (mut places, mut pairs) = (BTreeMap::new(), BTreeMap::new());
            for round in 0..2 * count {
                let order = order(count, round);
                order.iter().copied().enumerate().for_each(|at| *places.entry(at).or_insert(0) += 1);
                order.windows(2).for_each(|pair| *pairs.entry((pair[0], pair[1])).or_insert(0) += 1);
            }
            assert!(places.len() == count * count && places.values().all(|times| *times == 2), "{count}: {places:?}");
            assert!(
                pairs.len() == count * (count - 1) && pairs.values().all(|times| *times == 2),
                "{count}: {pairs:?}"
            );
        }
    }

    #[test]
    fn everyone_comes_first_once_in_as_many_rounds() {
        for count in 1..8 {
            let mut firsts: Vec<_> = (0..count).map(|round| order(count, round)[0]).collect();
            firsts.sort_unstable();
            assert_eq!(firsts, (0..count).collect::<Vec<_>>());
        }
    }
}
