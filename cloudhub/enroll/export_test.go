package enroll

// Sweep does one round of housekeeping.
var Sweep = (*Enroll).sweep
