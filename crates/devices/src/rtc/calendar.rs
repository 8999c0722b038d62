//! Seconds since 1970 and the proleptic Gregorian calendar, both ways.
//!
//! Every value of every field has a meaning: days and months out of range carry over, so a guest's nonsense stays arithmetic.

/// A time as the clock's registers show it. `weekday` is 1 for Sunday.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CalendarTime {
    pub(crate) year: u16,
    pub(crate) month: u8,
    pub(crate) day: u8,
    pub(crate) weekday: u8,
    pub(crate) hour: u8,
    pub(crate) minute: u8,
    pub(crate) second: u8,
}

const DAYS_PER_400_YEARS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

impl CalendarTime {
    /// The time this many seconds after 1970-01-01 00:00.
    pub(crate) fn from_unix_s(unix_s: u64) -> Self {
        let days = (unix_s / 86_400) as i64;
        // Years counted from March, so that the leap day is the last of its year.
        let shifted = days + DAYS_TO_1970;
        let (era, day_of_era) = (shifted / DAYS_PER_400_YEARS, shifted % DAYS_PER_400_YEARS);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        CalendarTime {
            year: year as u16,
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (unix_s / 3600 % 24) as u8,
            minute: (unix_s / 60 % 60) as u8,
            second: (unix_s % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00; zero for times before. The weekday is not looked at.
    pub(crate) fn to_unix_s(self) -> u64 {
        let month = i64::from(self.month) - 1;
        let (year, month) = (i64::from(self.year) + month.div_euclid(12), month.rem_euclid(12) + 1);
        let year_from_march = year - i64::from(month <= 2);
        let (era, year_of_era) = (year_from_march.div_euclid(400), year_from_march.rem_euclid(400));
        let month_from_march = (month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_PER_400_YEARS + day_of_era - DAYS_TO_1970;
        let seconds = ((days * 24 + i64::from(self.hour)) * 60 + i64::from(self.minute)) * 60 + i64::from(self.second);
        seconds.max(0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_come_out_right() {
        let time = CalendarTime::from_unix_s(951_782_400 + 3661);
        assert_eq!((time.year, time.month, time.day, time.weekday), (2000, 2, 29, 3));
        assert_eq!((time.hour, time.minute, time.second), (1, 1, 1));
        let epoch = CalendarTime::from_unix_s(0);
        assert_eq!((epoch.year, epoch.month, epoch.day, epoch.weekday), (1970, 1, 1, 5));
    }

    #[test]
    fn both_directions_agree_on_every_day_of_two_centuries() {
        for day in 0..73_000u64 {
            let unix_s = day * 86_400 + 86_399;
            assert_eq!(CalendarTime::from_unix_s(unix_s).to_unix_s(), unix_s);
        }
    }

    #[test]
    fn nonsense_carries_over_and_never_overflows() {
        let nonsense =
            CalendarTime { year: 9999, month: 255, day: 255, weekday: 255, hour: 255, minute: 255, second: 255 };
        nonsense.to_unix_s();
        let zero = CalendarTime { year: 0, month: 0, day: 0, weekday: 0, hour: 0, minute: 0, second: 0 };
        assert_eq!(zero.to_unix_s(), 0);
    }
}
