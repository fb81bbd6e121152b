package store

import (
	"encoding/json"
	"fmt"
)

// cloudStatus are the fields of a pod's status that the control plane writes.
var cloudStatus = [...]string{"nominatedNodeName", "resourceClaimStatuses", "extendedResourceClaimStatus"}

// kubeletOwns tells whether the kubelet is the only one to write a pod
// condition; upstream's list is in pkg/kubelet/types, and a test compares.
func kubeletOwns(condition string) bool {
	switch condition {
	case "PodScheduled", "Ready", "Initialized", "ContainersReady", "PodResizeInProgress",
		"PodResizePending", "PodReadyToStartContainers", "AllContainersRestarting":
		return true
	}
	return false
}

// mergePod prepares the cloud's d to replace cur: everything is the cloud's but
// the status, which is the kubelet's except for conditions and fields the
// control plane writes. A deletion once known here stays.
func mergePod(d doc, cur *Object) error {
	own, err := parseDoc(cur.Body)
	if err != nil {
		return err
	}
	if _, deleted := own.meta["deletionTimestamp"]; deleted {
		if _, known := d.meta["deletionTimestamp"]; !known {
			for _, f := range []string{"deletionTimestamp", "deletionGracePeriodSeconds"} {
				if raw, ok := own.meta[f]; ok {
					d.meta[f] = raw
				}
			}
		}
	}
	ours, err := own.object("status")
	if err != nil {
		return err
	}
	theirs, err := d.object("status")
	if err != nil {
		return err
	}
	if ours == nil {
		return nil
	}
	if theirs != nil {
		for _, f := range cloudStatus {
			if raw, ok := theirs[f]; ok {
				ours[f] = raw
			} else {
				delete(ours, f)
			}
		}
		if raw, err := mergeConditions(ours["conditions"], theirs["conditions"]); err != nil {
			return err
		} else if raw != nil {
			ours["conditions"] = raw
		}
	}
	d.top["status"], err = json.Marshal(ours)
	return err
}

// mergeConditions keeps the kubelet's conditions from ours and takes the rest
// from theirs. DisruptionTarget is written by both; the local one wins.
func mergeConditions(ours, theirs json.RawMessage) (json.RawMessage, error) {
	if len(theirs) == 0 {
		return ours, nil // the feed need not carry the status
	}
	mine, err := conditions(ours)
	if err != nil {
		return nil, err
	}
	cloud, err := conditions(theirs)
	if err != nil {
		return nil, err
	}
	const shared = "DisruptionTarget"
	out := []json.RawMessage{}
	hasShared := false
	for _, c := range mine {
		if kubeletOwns(c.typ) || c.typ == shared {
			out = append(out, c.raw)
			hasShared = hasShared || c.typ == shared
		}
	}
	for _, c := range cloud {
		if !kubeletOwns(c.typ) && !(c.typ == shared && hasShared) {
			out = append(out, c.raw)
		}
	}
	return json.Marshal(out)
}

type condition struct {
	typ string
	raw json.RawMessage
}

func conditions(raw json.RawMessage) ([]condition, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("status.conditions: %w", err)
	}
	out := make([]condition, 0, len(list))
	for _, r := range list {
		var c struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(r, &c); err != nil {
			return nil, fmt.Errorf("status.conditions: %w", err)
		}
		out = append(out, condition{c.Type, r})
	}
	return out, nil
}

// mergeNode prepares the cloud's d to replace cur: spec and the rest of the
// metadata are the cloud's, the status ours; labels and annotations are merged
// by key, where the keys changed here and not yet acknowledged are ours.
func mergeNode(d doc, cur *Object, local map[string]map[string]bool) error {
	own, err := parseDoc(cur.Body)
	if err != nil {
		return err
	}
	if ours, err := own.object("status"); err != nil {
		return err
	} else if ours != nil {
		d.top["status"] = own.top["status"]
	}
	for field, keys := range local {
		if len(keys) == 0 {
			continue
		}
		ours, err := rawObject(own.meta, field)
		if err != nil {
			return err
		}
		theirs, err := rawObject(d.meta, field)
		if err != nil {
			return err
		}
		if theirs == nil {
			theirs = map[string]json.RawMessage{}
		}
		for k := range keys {
			if v, ok := ours[k]; ok {
				theirs[k] = v
			} else {
				delete(theirs, k)
			}
		}
		if d.meta[field], err = json.Marshal(theirs); err != nil {
			return err
		}
	}
	return nil
}

const mirrorAnnotation = "kubernetes.io/config.mirror"

// isMirror tells whether a pod stands for a static pod of this node.
func isMirror(body []byte) bool {
	var p struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return false
	}
	_, ok := p.Metadata.Annotations[mirrorAnnotation]
	return ok
}
